"""A model's output layer, and the scale, the soft cap and the bias that turn its output into logits."""

from __future__ import annotations

from typing import Any, cast

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..rules.post_ops import PostOps

# Granite divides its logits by ``config.logits_scaling``. Of the models with that setting, these multiply instead:
_MULTIPLIED_BY_LOGITS_SCALING = frozenset({"hyperclovax", "hyperclovax_seed"})
# and these scale the hidden states before the output layer:
_SCALED_BEFORE_THE_HEAD = frozenset({"minicpm3"})


def output_layer(core: nn.Module) -> nn.Module | None:
    """Return the output layer, from hidden states to logits; None if there is none to be found.

    It is what ``get_output_embeddings()`` returns, or else ``lm_head``; of PEFT's ``modules_to_save`` the active copy.

    Args:
        core: the language model without wrappers.
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
    """Return the post-ops that the model applies to the output of its output layer, from its configuration.

    ``logit_scale`` multiplies (Cohere), ``logits_scaling`` divides (Granite; HyperCLOVA-X multiplies),
    ``lm_head_multiplier`` multiplies (Falcon H1), ``final_logit_softcapping`` caps (Gemma 2 and later; RecurrentGemma
    calls it ``logits_soft_cap``). `FusedHead` checks on the first batch that the model does nothing else.
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
