"""The lower layers of a decoder-only model, frozen: what they put out, and a forward that takes it ready-made.

`FrozenLayers` finds the decoder's layers in the model, stops the training of the embeddings and of the lowest of the
layers, computes what these put out without running the rest, and lets a forward of the whole model begin above them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .language_model import core_model, logits_in

# Settings of a configuration that change nothing that a layer puts out.
_WITHOUT_EFFECT = frozenset(
    {"_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype"}
    | {"transformers_version", "use_cache"}
)


class FrozenLayersError(ValueError):
    """The lower layers of this model cannot be frozen or left out; the message says why and what to do."""


class _EnoughError(Exception):
    """Ends a forward whose upper layers are not wanted."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the list of a decoder's layers and its name within the language model without wrappers.

    It is the longest `nn.ModuleList` that is not part of another one.

    Args:
        model: a decoder-only language model, possibly wrapped.

    Raises:
        FrozenLayersError: for an encoder-decoder, where there is no such list, or its layers are of several classes.
    """
    core = core_model(model)
    name = type(core).__name__
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False):
        raise FrozenLayersError(
            f"{name} is an encoder-decoder: lower layers can be frozen in decoder-only language models (Llama, GPT-2 "
            "and the like). Leave freeze_layers out."
        )
    lists = {path: part for path, part in core.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise FrozenLayersError(f"{name} has no list of layers (nn.ModuleList): leave freeze_layers out.")
    path = max(outermost, key=lambda candidate: len(lists[candidate]))
    kinds = sorted({type(layer).__name__ for layer in lists[path]})
    if len(kinds) > 1:
        raise FrozenLayersError(
            f"the layers of {name} ({path}) are of several classes ({', '.join(kinds)}); lower layers can be frozen "
            "where all are of one. Leave freeze_layers out."
        )
    return path, lists[path]


def modules_within(path: str, number: int) -> str:
    """Return a regular expression for the names of all modules within the lowest layers, for PEFT's excluded ones.

    Args:
        path: of the list of layers, as `decoder_layers` returns it.
        number: of layers.
    """
    return rf"(.*\.)?{re.escape(path)}\.({'|'.join(map(str, range(number)))})\..*"


class FrozenLayers:
    """The embeddings and the lowest layers of a model, which are not trained from now on.

    Frozen is every parameter that the output of the lowest layers does not pass on its way to the logits. Those of the
    layers above, of the final norm and of the output layer stay as trainable as they were, but an output layer that
    shares its weights with the embeddings is frozen with them.

    Args:
        model: a decoder-only language model, possibly with a PEFT adapter; changed in place.
        number: of layers to freeze, from the embeddings up.

    Raises:
        FrozenLayersError: if the model has fewer layers, does not call each of them once and in order, drops layers at
            random, has an adapter or prompt that trains something in or before the frozen layers, or has nothing
            left to train.
    """

    def __init__(self, model: nn.Module, number: int) -> None:
        self.core = core_model(model)
        self.number = number
        self._name = type(self.core).__name__
        self.path, layers = decoder_layers(model)
        if not 1 <= number <= len(layers):
            raise FrozenLayersError(
                f"freeze_layers={number}: {self._name} has {len(layers)} layers; freeze 1 to {len(layers)} of them."
            )
        config: Any = getattr(self.core, "config", None)
        for setting in ("layerdrop", "decoder_layerdrop"):
            if getattr(config, setting, 0):
                raise FrozenLayersError(
                    f"{self._name} leaves out layers at random ({setting}={getattr(config, setting)}): set {setting} "
                    "to 0 in its configuration to freeze lower layers."
                )
        self._layers = list(layers[:number])
        self._upper = list(layers[number:])
        self._beside: list[Callable[[Tensor], Any]] = []
        self._below: list[nn.Module] = []  # what runs up to the last frozen layer, the model itself left out
        self._watch()
        self._freeze(model)

    # ---- what is frozen --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Find out from a forward of two tokens what the layers return, and which modules run below the last one."""
        order: list[tuple[str, nn.Module]] = []
        outputs: dict[int, Any] = {}

        def note(event: str) -> Callable[..., None]:
            def hook(module: nn.Module, *arguments: Any) -> None:
                order.append((event, module))
                if event == "end" and module in self._layers:
                    outputs[self._layers.index(module)] = arguments[-1]

            return hook

        handles = [module.register_forward_pre_hook(note("begin")) for module in self.core.modules()]
        handles += [module.register_forward_hook(note("end")) for module in self.core.modules()]
        try:
            with torch.no_grad(), _evaluating(self.core.modules()):
                self.core(**self._two_tokens())
        finally:
            for handle in handles:
                handle.remove()
        ended = [self._layers.index(module) for event, module in order if event == "end" and module in self._layers]
        if ended != list(range(self.number)):
            raise FrozenLayersError(
                f"{self._name} does not call each of its layers ({self.path}) once and in order for a text: lower "
                "layers cannot be frozen. Leave freeze_layers out."
            )
        self._beside = [self._rebuild(index, outputs[index]) for index in range(self.number)]
        place = order.index(("end", self._layers[-1]))
        begun = {id(module): module for event, module in order[:place] if event == "begin"}
        finished = {id(module) for event, module in order[:place] if event == "end"}
        later = {id(module) for _, module in order[place + 1 :]} & finished  # such as a dropout that is used twice
        within = {id(part): part for layer in self._layers for part in layer.modules()}
        below = {key: module for key, module in begun.items() if key not in later and module is not self.core}
        self._below = list((within | below).values())

    def _rebuild(self, index: int, output: Any) -> Callable[[Tensor], Any]:
        """Return what makes the output of a layer from hidden states, in the form that its class returns."""
        if isinstance(output, Tensor):
            return lambda states: states
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            # attention weights and the like, which the next layer has no use for; `check` would notice if it had
            rest = [None if isinstance(part, Tensor) else part for part in output[1:]]
            return lambda states: type(output)((states, *rest))
        raise FrozenLayersError(
            f"layer {index} of {self._name} returns {type(output).__name__} and not hidden states first: lower layers "
            "cannot be left out. Leave freeze_layers out."
        )

    def _two_tokens(self) -> dict[str, Tensor]:
        device = next(self.core.parameters()).device
        return {"input_ids": torch.tensor([[0, 1]], device=device)}

    def _freeze(self, model: nn.Module) -> None:
        find = getattr(self.core, "get_input_embeddings", None)
        embeddings = find() if callable(find) else None
        frozen = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        frozen |= {id(parameter) for parameter in embeddings.parameters()} if embeddings is not None else set()
        above = {id(parameter) for layer in self._upper for parameter in layer.parameters()} - frozen
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in frozen | above]
        above |= {id(parameter) for parameter in self._reached(others)}
        adapted = _peft_model(model)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or id(parameter) in above:
                continue
            if adapted:
                raise FrozenLayersError(
                    f"the adapter trains {name}, which is in or below the {self.number} frozen layers: adapt layers "
                    f"from {self.number} on alone (PEFT's layers_to_transform), or freeze fewer layers."
                )
            parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise FrozenLayersError(
                f"with freeze_layers={self.number} nothing of {self._name} is left to train: freeze fewer layers."
            )

    def _reached(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters that the logits depend on beside the output of the last frozen layer."""
        if not parameters:
            return []
        inputs = self._two_tokens()
        states = self.outputs(inputs)
        try:
            with torch.enable_grad(), _evaluating(self.core.modules()), self.skipped(states):
                logits = logits_in(self.core(**inputs))
        except Exception as error:
            raise FrozenLayersError(
                f"{self._name} needs more of its lower layers than hidden states ({type(error).__name__}: {error}): "
                "they cannot be left out. Leave freeze_layers out."
            ) from error
        if logits is None or not logits.requires_grad:
            return []
        gradients = torch.autograd.grad(logits.float().sum(), parameters, allow_unused=True)
        return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]

    def digest(self) -> str:
        """Return a hash of all that decides what the frozen layers put out: weights, class, configuration, number."""
        config: Any = getattr(self.core, "config", None)
        settings = config.to_dict() if hasattr(config, "to_dict") else {}
        kept = sorted((str(key), str(value)) for key, value in settings.items() if key not in _WITHOUT_EFFECT)
        attention = getattr(config, "_attn_implementation", None)
        found = hashlib.sha256(repr((self._name, self.number, attention, kept)).encode())
        for name, value in self._own_tensors():
            plain = value.detach().cpu().contiguous()
            found.update(f"\0{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
            found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters and buffers of all modules that run up to the last frozen layer, by name."""
        below = {id(module) for module in self._below}
        for path, module in self.core.named_modules():
            if id(module) in below:
                for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                    yield f"{path}.{name}", value

    def changes(self) -> Any:
        """Return a value that is another one once a frozen weight was written to or moved; reads none of them."""
        return [(value.data_ptr(), value._version) for _, value in self._own_tensors()]

    def has_dropout(self) -> bool:
        """Return whether the frozen part would drop out values in training mode."""
        rates = [module.p for module in self._below if isinstance(module, nn.Dropout)]
        config: Any = getattr(self.core, "config", None)
        rates += [getattr(config, name, 0.0) or 0.0 for name in ("dropout", "attention_dropout", "hidden_dropout")]
        return any(rates)

    # ---- forwards --------------------------------------------------------------------------------------------------

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep the frozen part in evaluation mode for the length of a forward, the rest in the mode that it is in."""
        with _evaluating(self._below):
            yield

    def outputs(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return what the last frozen layer puts out for a batch, ``[B, T, D]``, without running the layers above.

        Args:
            inputs: of the language model, without labels.
        """
        found: list[Tensor] = []

        def catch(_module: nn.Module, _arguments: Any, output: Any) -> None:
            found.append(output if isinstance(output, Tensor) else output[0])
            raise _EnoughError

        handle = self._layers[-1].register_forward_hook(catch)
        try:
            with torch.no_grad(), _evaluating(self.core.modules()):
                self.core(**inputs)
        except _EnoughError:
            return found[0]
        finally:
            handle.remove()
        raise FrozenLayersError(f"{self._name} no longer calls its layers ({self.path}).")

    @contextmanager
    def skipped(self, states: Tensor) -> Iterator[None]:
        """Let forwards of the model take ready states in the place of the last frozen layer's output.

        Everything else is done as ever: embeddings are looked up and dropped, masks, positions, the layers above and
        the output layer are the model's own.

        Args:
            states: ``[B, T, D]``, for the batch that the model is called with.
        """
        last = self.number - 1
        before = [vars(layer).get("forward") for layer in self._layers]

        def passing(index: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *_arguments: Any, **_options: Any) -> Any:
                if index < last:
                    return self._beside[index](hidden_states)
                if hidden_states.shape[:-1] != states.shape[:-1]:
                    raise FrozenLayersError(
                        f"the layers of {self._name} are called with states of shape {tuple(hidden_states.shape)} for "
                        f"kept ones of shape {tuple(states.shape)}: something puts positions before the text. Turn "
                        "the cache off (frozen_cache off)."
                    )
                return self._beside[index](states)

            return forward

        for index, layer in enumerate(self._layers):
            layer.forward = passing(index)  # type: ignore[method-assign, assignment]
        try:
            with self.evaluating():
                yield
        finally:
            for layer, own in zip(self._layers, before, strict=True):
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own  # type: ignore[method-assign]

    def check(self, inputs: Mapping[str, Any], states: Tensor) -> None:
        """Compare kept states, and the logits that they lead to, with those of the whole model.

        Args:
            inputs: of the language model, without labels.
            states: kept for that batch, ``[B, T, D]``; where ``attention_mask`` is 0 they may be anything finite.

        Raises:
            FrozenLayersError: if one of them differs by more than rounding.
        """
        mask = inputs.get("attention_mask")
        real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask.bool()
        real = real.to(states.device)
        own = self.outputs(inputs)
        rounding = 16 * (self.number + 1) ** 0.5 * torch.finfo(own.dtype).eps
        self._compare("states", own[real], states[real], rounding)
        with torch.no_grad(), _evaluating(self.core.modules()):
            whole = self.core(**inputs)
            with self.skipped(own):
                fed = self.core(**inputs)
        whole_logits, fed_logits = logits_in(whole), logits_in(fed)
        if whole_logits is None or fed_logits is None:
            raise FrozenLayersError(f"{self._name} returns no logits that could be compared.")
        # from the same states on both do the same, so nothing but the padding may differ
        near = 16 * torch.finfo(whole_logits.dtype).eps
        real = real.to(whole_logits.device)
        self._compare("logits", whole_logits[real], fed_logits[real], near)
        added = [getattr(output, "aux_loss", None) for output in (whole, fed)]
        if isinstance(added[0], Tensor) and not (
            isinstance(added[1], Tensor) and torch.allclose(added[0], added[1].to(added[0].device), rtol=near)
        ):
            raise FrozenLayersError(
                f"{self._name} adds to its loss what its lower layers decide (aux_loss): turn output_router_logits "
                "off in its configuration, or the cache (frozen_cache off)."
            )

    def _compare(self, what: str, own: Tensor, kept: Tensor, allowed: float) -> None:
        own, kept = own.float(), kept.to(own.device).float()
        difference, size = float((own - kept).norm()), float(own.norm())
        if not difference <= allowed * size:  # NaN too
            raise FrozenLayersError(
                f"the {what} that come of kept outputs of the lower layers of {self._name} differ from the model's by "
                f"{difference / size if size else difference:.3g} of their size (rounding may give {allowed:.1g}): "
                "turn the cache off (frozen_cache off)."
            )


@contextmanager
def _evaluating(modules: Any) -> Iterator[None]:
    """Put modules, each by itself, into evaluation mode for the length of a context."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _peft_model(model: nn.Module) -> bool:
    inner: Any = model
    while inner is not None:
        if isinstance(inner, PeftModel):
            return True
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    return False
