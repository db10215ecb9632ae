"""Expected depth of a decoder: after how many layers its most likely next token no longer changes.

Every layer's output is read as if it were the last one, through the model's own final norm and output layer. The depth
of a token is the smallest l in 0..L for which the readings of layers l..L all have the same top-1; layer 0 is the
embeddings.

Sources: nostalgebraist, "interpreting GPT: the logit lens" (2020); the saturation of early exits in Elbayad et al.,
"Depth-Adaptive Transformer" (ICLR 2020, section 4) and Schuster et al., "Confident Adaptive Language Modeling"
(NeurIPS 2022).
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...models.language_model import core_model, inputs_without_labels
from ...models.output_layer import added_bias, output_layer, post_ops
from ...rules.losses import IGNORE_INDEX

# Rows that are read at a time, fewer where their logits would take more bytes than this.
_CPU_ROWS, _DEVICE_ROWS, _MOST_BYTES = 256, 2048, 2**29

# Rows on which the reading is compared with the model at the first batch, of the scored ones and of all.
_CHECKED_ROWS = 4


class DepthReaderError(ValueError):
    """The layers of this model cannot be read; the message says why."""


class DepthReader:
    """Read the depth of each token of a model's predictions.

    The modules between the last layer and the output layer, and a constant factor there (T5's ``d_model**-0.5``), are
    found by watching the first batch with scored tokens, on which the reading of the last layer is also compared with
    the model's own logits. Logits exist for 256 rows at a time on a CPU, and of the layers below the last, only
    tokens are read whose top-1 has not changed yet.

    Args:
        model: possibly wrapped (PEFT, data parallelism, torch.compile, whose compiled forward is left aside).
        chunk_rows: rows whose logits exist at a time; None chooses for the device.

    Raises:
        DepthReaderError: if the model has no output layer of its own, or does not tell how many layers it has, or has
            no ``output_hidden_states``.
        ValueError: for ``chunk_rows`` below 1.
    """

    def __init__(self, model: nn.Module, *, chunk_rows: int | None = None) -> None:
        if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
            raise ValueError(f"chunk_rows={chunk_rows} must be a whole number from 1 on; None chooses for the device.")
        self._model, self._chunk_rows = _without_outer_wrappers(model), chunk_rows
        self._core = core_model(model)
        self._name = type(self._core).__name__
        self._output_layer()
        self._accepts = _keyword_check(self._core.forward)
        if not self._accepts("output_hidden_states"):
            raise DepthReaderError(
                f"the forward of {self._name} has no output_hidden_states, so its layers cannot be read. The expected "
                "depth needs a language model with the interface of Transformers."
            )
        #: L, the layers of the decoder.
        self.layers: int = self._layer_number()
        self._transform: _FinalTransform | None = None
        self._transform_of: nn.Module | None = None

    def depths(self, batch: Mapping[str, Any], targets: Tensor) -> Tensor:
        """Return the depth of each scored token, from one forward of the model, in evaluation mode and without graph.

        Equivalent plain torch, with ``read`` the final norm, the output layer and what the model does behind it::

            top = torch.stack([read(state).argmax(-1) for state in hidden_states[:-1]] + [logits.argmax(-1)])
            depth = L + 1 - (top == top[-1]).flip(0).cumprod(0).sum(0)

        Args:
            batch: inputs of the model; ``labels`` are left out, or make the decoder's inputs.
            targets: the label that each position of the model's output is scored against, as `align_targets` gives
                them, ``[B, T]`` or flattened; -100 is not scored and not read.

        Returns:
            int64 ``[tokens]`` in 0..L, in the order of the targets.

        Raises:
            DepthReaderError: if something between the last layer and the logits is not known here.
            ValueError: if the targets do not fit the output.
        """
        scored = (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(-1)
        if not len(scored):
            return scored
        layer = self._output_layer()
        known = self._transform is not None and self._transform_of is layer
        inputs = inputs_without_labels(self._model, batch)
        inputs["output_hidden_states"] = True
        if self._accepts("return_dict"):
            inputs["return_dict"] = True
        watcher = _ForwardWatcher(self._core, layer, targets.numel(), scored)
        with torch.no_grad(), _evaluating(self._model):
            with watcher.attached(find_transform=not known):
                outputs = self._model(**inputs)
            states = self._layer_states(outputs, targets.numel())
            if watcher.hidden is None:
                raise DepthReaderError(f"{self._name} makes its logits without calling its output layer.")
            with watcher.autocast():
                if not known:
                    transform = watcher.transform(self._name)
                    self._check_against_model(outputs, layer, watcher.rows)
                    self._transform, self._transform_of = transform, layer
                return self._depths_of(layer, watcher.hidden, states, scored)

    def _depths_of(self, layer: nn.Module, hidden: Tensor, states: Sequence[Tensor], scored: Tensor) -> Tensor:
        """Return the depth of each scored token from what the output layer was given and the states below."""
        final = self._most_likely(layer, hidden, scored, None)
        depth = torch.full_like(scored, self.layers)
        # from the last layer down, each token until its reading differs for the first time
        open_tokens = torch.arange(len(scored), device=scored.device)
        for number in reversed(range(self.layers)):
            top = self._most_likely(layer, states[number], scored[open_tokens], self._transform)
            open_tokens = open_tokens[top == final[open_tokens]]
            if not len(open_tokens):
                break
            depth[open_tokens] = number
        return depth

    def _most_likely(
        self, layer: nn.Module, states: Tensor, places: Tensor, transform: _FinalTransform | None
    ) -> Tensor:
        """Return the most likely token at some places, a chunk of rows at a time."""
        flat = states.reshape(-1, states.shape[-1])
        size = self._chunk_rows or _CPU_ROWS
        if self._chunk_rows is None and flat.device.type != "cpu":
            vocabulary = getattr(layer, "out_features", 2**17)
            size = max(1, min(_DEVICE_ROWS, _MOST_BYTES // (4 * vocabulary)))
        found = []
        for part in places.to(flat.device).split(size):
            rows = flat.index_select(0, part)
            if states.dim() > 2:
                rows = rows[None]
            logits = self._logits(layer, rows if transform is None else transform(rows))
            found.append(logits.argmax(-1).reshape(-1).to(places.device))
            del logits  # before the next chunk is allocated
        return torch.cat(found)

    def _logits(self, layer: nn.Module, rows: Tensor) -> Tensor:
        z, bias = layer(rows), added_bias(self._core)
        return post_ops(self._core)(z if bias is None else z + bias.to(z.device))

    # ---- what the model is -----------------------------------------------------------------------------------------

    def _output_layer(self) -> nn.Module:
        layer = output_layer(self._core)
        if layer is None:
            raise DepthReaderError(
                f"{self._name} has no output layer that get_output_embeddings() or lm_head names, so nothing reads "
                "its layers."
            )
        if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in layer.parameters()):
            raise DepthReaderError(
                f"the output layer of {self._name} is sharded over processes (FSDP, ZeRO-3, tensor parallelism), "
                "which reads it in the model's forward alone; load the saved model in one process to read its depth."
            )
        return layer

    def _layer_number(self) -> int:
        config: Any = getattr(self._core, "config", None)
        names: tuple[str, ...] = ("num_hidden_layers",)
        if getattr(config, "is_encoder_decoder", False):
            names = ("num_decoder_layers", "decoder_layers", *names)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        # what get_text_config returns of BART has lost decoder_layers
        found = (getattr(source, name, None) for name in names for source in (config, text))
        number = next((value for value in found if isinstance(value, int)), None)
        if number is None or number < 1:
            raise DepthReaderError(f"the config of {self._name} does not tell its number of layers ({names[0]}).")
        return number

    def _layer_states(self, outputs: Any, positions: int) -> Sequence[Tensor]:
        """Return the states before the first layer and after each."""
        named = outputs if isinstance(outputs, Mapping) else {}
        decoder = named.get("decoder_hidden_states")
        states = named.get("hidden_states") if decoder is None else decoder
        if states is None:
            raise DepthReaderError(f"{self._name} returns no hidden states when output_hidden_states is True.")
        shapes = [tuple(state.shape) for state in states]
        # the last one has gone through the final norm: what the output layer is given takes its place
        if len(shapes) != self.layers + 1 or any(math.prod(shape[:-1]) != positions for shape in shapes):
            raise DepthReaderError(
                f"{self._name} returns hidden states of shapes {shapes}; expected {self.layers + 1} (the embeddings "
                f"and {self.layers} layers) with {positions} positions each."
            )
        return states[:-1]

    def _check_against_model(self, outputs: Any, layer: nn.Module, rows: Tensor) -> None:
        """Raise unless the reading of what the output layer was given is what the model made of it."""
        mine, own = self._logits(layer, rows), outputs.get("logits")
        if not isinstance(own, Tensor) or own.shape != mine.shape:
            shape = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise DepthReaderError(f"{self._name} turns the output of its head {tuple(mine.shape)} into {shape}.")
        finite = torch.isfinite(mine)
        eps = max(torch.finfo(mine.dtype).eps, torch.finfo(own.dtype).eps)
        wide, own_wide = mine.double(), own.double()
        # from the same numbers, so they differ by the roundings of the post-ops alone
        tolerance = 8 * eps * float(torch.where(finite, wide, 0.0).abs().max())
        difference = float(torch.where(finite, wide - own_wide, 0.0).abs().max())
        top = own_wide.gather(-1, mine.argmax(-1, keepdim=True))
        tied = torch.isnan(top) | (top >= own_wide.amax(-1, keepdim=True) - tolerance)
        if not torch.equal(finite, torch.isfinite(own)) or difference > tolerance or not bool(tied.all()):
            raise DepthReaderError(
                f"{self._name} does something to its logits that is not known here: they differ by up to "
                f"{difference:.3g} from the output of its head."
            )


@dataclass(frozen=True)
class _FinalTransform:
    """What a model does to the last layer's states before its output layer: modules (the final norm), and a factor."""

    modules: tuple[nn.Module, ...]
    scale: float

    def __call__(self, rows: Tensor) -> Tensor:
        for module in self.modules:
            rows = module(rows)
        return rows if self.scale == 1.0 else rows * self.scale


class _ForwardWatcher:
    """Watch one forward: what the output layer is given, and the way there from the last layer.

    The output layer is handed on a few rows alone, so that the model never makes the logits of the others.
    """

    def __init__(self, core: nn.Module, layer: nn.Module, positions: int, scored: Tensor) -> None:
        self._core, self._layer, self._positions = core, layer, positions
        some = torch.linspace(0, len(scored) - 1, _CHECKED_ROWS).long().to(scored.device)
        spread = torch.linspace(0, positions - 1, _CHECKED_ROWS).long().to(scored.device)
        # with a single row a norm without weights could not be told from a factor
        self._checked_positions = torch.cat([scored[some], spread]).unique()
        self.hidden: Tensor | None = None
        self.rows = torch.empty(0)
        self._autocast: tuple[str, torch.dtype, bool] = ("cpu", torch.bfloat16, False)
        self._layer_output: Tensor | None = None
        self._followed: Tensor | None = None
        self._modules: list[nn.Module] = []
        self._running: nn.Module | None = None

    @contextlib.contextmanager
    def attached(self, *, find_transform: bool) -> Iterator[None]:
        """Listen for the length of a block."""
        handles = [self._layer.register_forward_pre_hook(self._before_output_layer, with_kwargs=True)]
        inside = set(self._layer.modules())
        try:
            for name, module in self._core.named_modules() if find_transform else ():
                if module in inside or self._layer in module.modules():
                    continue
                numbers = [part.isdigit() for part in name.split(".")]
                if any(numbers) and numbers.index(True) == len(numbers) - 1:
                    handles.append(module.register_forward_hook(self._after_layer))
                elif not any(numbers):
                    handles.append(module.register_forward_pre_hook(self._before_module, with_kwargs=True))
                    handles.append(module.register_forward_hook(self._after_module))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        first = next(iter(output), None) if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            self._layer_output = self._followed = first
            self._modules, self._running = [], None

    def _before_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        current = self._followed
        if (
            self._running is None
            and current is not None
            and len(args) == 1
            and not kwargs
            and _is_same_tensor(args[0], current)
        ):
            self._running = module

    def _after_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is not self._running:
            return
        self._running = None
        if isinstance(output, Tensor) and not _is_same_tensor(
            output, self._followed
        ):  # a dropout returns what it is given
            self._modules.append(module)
            self._followed = output

    def _before_output_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        name = type(self._core).__name__
        if self.hidden is not None:
            raise DepthReaderError(f"{name} uses its output layer more than once in a forward.")
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            raise DepthReaderError(f"{name} calls its output layer with more than hidden states.")
        hidden = args[0]
        if math.prod(hidden.shape[:-1]) != self._positions:
            raise ValueError(
                f"the output layer of {name} is given {tuple(hidden.shape[:-1])} positions, but there are "
                f"{self._positions} targets; align_targets(labels, length, alignment) makes one for each."
            )
        kind = hidden.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.hidden, self.rows = hidden.detach(), self._checked_rows(hidden)
        self._running = None
        return (self.rows,), {}

    def _checked_rows(self, states: Tensor) -> Tensor:
        """Return the rows of some states that the reading is compared on."""
        rows = states.detach().reshape(-1, states.shape[-1]).index_select(0, self._checked_positions.to(states.device))
        return rows[None] if states.dim() > 2 else rows

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute as the model did when it called its output layer."""
        kind, dtype, enabled = self._autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            yield

    def transform(self, name: str) -> _FinalTransform:
        """Return what was seen between the last layer and the output layer, after running it a second time."""
        reason = f"cannot tell what {name} does between its last layer and its output layer"
        if self._layer_output is None:
            raise DepthReaderError(f"{reason}: none of its modules is a numbered layer.")
        if math.prod(self._layer_output.shape[:-1]) != self._positions:
            raise DepthReaderError(
                f"{reason}: its last numbered layer returns {tuple(self._layer_output.shape)} for {self._positions} "
                "positions."
            )
        with_modules = _FinalTransform(tuple(self._modules), 1.0)(self._checked_rows(self._layer_output)).to(
            self.rows.device
        )
        modules = ", ".join(type(module).__name__ for module in self._modules) or "no module"
        if with_modules.shape != self.rows.shape:
            raise DepthReaderError(
                f"{reason}: after {modules} states have {with_modules.shape[-1]} entries, and it is given "
                f"{self.rows.shape[-1]}."
            )
        mine, given = with_modules.double(), self.rows.double()
        sound = torch.isfinite(mine) & torch.isfinite(given)
        mine, given = mine[sound], given[sound]
        scale = 1.0
        if not torch.equal(mine, given) and float(mine.square().sum()) > 0:
            scale = float((mine * given).sum() / mine.square().sum())
        eps = max(torch.finfo(with_modules.dtype).eps, torch.finfo(self.rows.dtype).eps)
        error = float((mine * scale - given).abs().max()) if len(mine) else 0.0
        # a module that computes on fewer rows may add its products up in another order
        if error > 64 * eps * float(given.abs().max() if len(given) else 0.0):
            message = f"{reason}: {modules} and a factor of {scale:.4g} leave a difference of {error:.3g}."
            raise DepthReaderError(message)
        # the least squares are not told from 1 by more than the rounding of the states
        return _FinalTransform(tuple(self._modules), 1.0 if abs(scale - 1.0) <= eps else scale)


def _is_same_tensor(a: Any, b: Tensor | None) -> bool:
    """Return whether two tensors are the same numbers in memory, be it in another shape."""
    if not isinstance(a, Tensor) or b is None or a.numel() != b.numel():
        return False
    return a is b or (a.data_ptr() == b.data_ptr() != 0)


def _keyword_check(forward: Callable[..., Any]) -> Callable[[str], bool]:
    parameters = inspect.signature(forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return lambda name: anything or name in parameters


def _without_outer_wrappers(model: nn.Module) -> nn.Module:
    """Return the model inside data parallelism and torch.compile (whose graphs fire no hooks), but with its PEFT."""
    while not isinstance(model, PeftModel):
        candidates = (getattr(model, attribute, None) for attribute in ("_orig_mod", "module"))
        inner = next((inner for inner in candidates if isinstance(inner, nn.Module)), None)
        if inner is None:
            break
        model = inner
    return model


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode and every module back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
