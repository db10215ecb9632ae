"""A model's output layer, and the scaling, capping and bias that turn its output into logits."""

from __future__ import annotations

from typing import Any, cast

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..rules.post_ops import PostOps

# Granite divides logits by ``config.logits_scaling``. These multiply by it; the next scale the hidden states instead.
_MULTIPLIED_BY_LOGITS_SCALING = frozenset({"hyperclovax", "hyperclovax_seed"})
_SCALED_BEFORE_THE_HEAD = frozenset({"minicpm3"})


def output_layer(core: nn.Module) -> nn.Module | None:
    """Return the layer from hidden states to logits, unwrapped from PEFT's ``modules_to_save``; None if unknown.

    Args:
        core: the language model without wrappers; its ``get_output_embeddings()`` is asked, then ``lm_head``.
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
    """Return scale and cap that the model applies to the output of its layer, read from its configuration.

    ``logit_scale`` multiplies (Cohere), ``logits_scaling`` divides (Granite; HyperCLOVA-X multiplies),
    ``lm_head_multiplier`` multiplies (Falcon H1), ``final_logit_softcapping`` caps (Gemma 2 and what follows it;
    RecurrentGemma calls it ``logits_soft_cap``). The check of the first batch detects a model that does anything else.
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
    """Return the bias ``[V]`` that BART's family adds to its logits (``final_logits_bias``), or None."""
    bias = getattr(core, "final_logits_bias", None)
    return bias.reshape(-1) if isinstance(bias, Tensor) else None
