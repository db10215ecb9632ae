"""A model's output layer, and what the model does to its output before it calls it logits."""

from __future__ import annotations

from typing import Any, cast

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..rules.post_ops import PostOps

# Granite divides by ``config.logits_scaling``; these multiply by it, and these scale the hidden states by it.
_MULTIPLIED_BY_LOGITS_SCALING = frozenset({"hyperclovax", "hyperclovax_seed"})
_SCALED_BEFORE_THE_HEAD = frozenset({"minicpm3"})


def output_layer(core: nn.Module) -> nn.Module | None:
    """Return the module that makes logits of hidden states, inside PEFT's ``modules_to_save``; None if unknown.

    Args:
        core: the language model without wrappers; its layer is what ``get_output_embeddings()`` returns, else
            ``lm_head``.
    """
    find = getattr(core, "get_output_embeddings", None)
    layer = find() if callable(find) else None
    if layer is None:
        layer = getattr(core, "lm_head", None)
    if isinstance(layer, ModulesToSaveWrapper):
        active = [name for name in layer.active_adapters if name in layer.modules_to_save]
        layer = layer.modules_to_save[active[0]] if active and not layer.disable_adapters else layer.original_module
    return cast("nn.Module | None", layer) if isinstance(layer, nn.Module) else None


def post_ops(core: nn.Module) -> PostOps:
    """Return what the model does to the output of its layer, read from its configuration by the field's names.

    ``logit_scale`` multiplies (Cohere), ``logits_scaling`` divides (Granite; HyperCLOVA-X multiplies),
    ``lm_head_multiplier`` multiplies (Falcon H1), ``final_logit_softcapping`` caps (Gemma 2 and what follows it;
    RecurrentGemma calls it ``logits_soft_cap``). A model that does more is found out by the check of the
    first batch.
    """
    config: Any = getattr(core, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= float(getattr(text, name, None) or 1.0)
    model_type = getattr(text, "model_type", "")
    logits_scaling = float(getattr(text, "logits_scaling", None) or 1.0)
    if model_type in _SCALED_BEFORE_THE_HEAD:
        logits_scaling = 1.0
    multiplies = model_type in _MULTIPLIED_BY_LOGITS_SCALING
    scale = scale * logits_scaling if multiplies else scale / logits_scaling
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    return PostOps(scale, float(softcap) if softcap else None)


def added_bias(core: nn.Module) -> Tensor | None:
    """Return what the model adds to the output of its layer, ``[V]``: the ``final_logits_bias`` of BART's family."""
    bias = getattr(core, "final_logits_bias", None)
    return bias.reshape(-1) if isinstance(bias, Tensor) else None
