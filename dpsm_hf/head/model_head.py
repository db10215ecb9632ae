"""The fused head in a model: during one call, the model's output layer scores tokens instead of returning logits.

While a batch is scored, ``forward`` of the language model and of its output layer are replaced on the *instance*; they
are restored right after, so saving, generating and a user's own calls never see the replacement. The call itself goes
through the wrapped model, so the hooks of DDP, FSDP and PEFT run as always.

The first batch is checked: the output layer returns real logits for a few rows, the model finishes its forward with
them, and the result must equal the logits that the fused head computed the loss from.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from ..models.language_model import (
    Alignment,
    align_targets,
    check_positions,
    core_model,
    is_compiled,
    logits_in,
    loss_in,
)
from ..models.output_layer import added_bias, output_layer, post_ops
from ..models.own_loss import replacement_of, turn
from ..rules.extra_statistics import ExtraStatistics
from ..rules.losses import IGNORE_INDEX, TokenScores
from ..rules.rows import STATISTICS
from ..rules.scoring_rules import Objective
from .gradient_path import depends_on, leaves, loss_after, output_of
from .options import Head, HeadOptions, LinearHead, ModuleHead
from .scoring_loss import ScoredRows, TokenLabels, score_hidden

# Rows whose real logits are compared at the first batch. Later batches return as many rows of zeros, so that whatever
# code the model runs on its logits still has some.
_CHECKED_ROWS = 4


class FusedHeadError(RuntimeError):
    """This model's tokens cannot be scored inside its output layer; the message says why."""


class OtherLossError(FusedHeadError):
    """In training the model computes its loss without calling its loss function, so it must not be given labels."""


@dataclass
class ScoredOutput(ModelOutput):
    """What the model returns in a scoring call: token scores in place of logits.

    A `ModelOutput` dataclass, because DDP and FSDP find the tensors only in output classes that they know.
    """

    loss: Tensor | None = None
    scored: Tensor | None = None
    nll: Tensor | None = None
    brier: Tensor | None = None
    spherical: Tensor | None = None
    confidence: Tensor | None = None
    correct: Tensor | None = None
    entropy: Tensor | None = None
    varentropy: Tensor | None = None
    extra: Tensor | None = None
    targets: Tensor | None = None
    added: Tensor | None = None  # what the model adds to the loss of its tokens, such as load balancing of experts
    aux_loss: Tensor | None = None  # the load balancing loss of experts as the model returned it, for logs
    tokens_loss: Tensor | None = None  # the loss of the tokens alone: a wrapper of the model may add to `loss`

    def scores(self) -> TokenScores:
        """Return the scores as `TokenScores`, whose ``loss`` is that of the whole batch."""
        return TokenScores(**{name: getattr(self, name) for name in ("loss", "scored", *STATISTICS, "extra")})


@dataclass(frozen=True)
class ScoringRequest:
    """The labels, the objective and the options for scoring one batch.

    Args:
        labels: ``[B, T]``.
        alignment: which label a row of the hidden states predicts; None if ``labels`` are aligned already
            (``shift_labels``).
        objective: the scoring rule with its options.
        denominator: the loss is the sum over tokens divided by this.
        entropy: also compute each token's entropy.
        chunk_tokens: rows of a chunk; None chooses for the device.
        extra: further statistics of each token, in evaluation.
        labelled: the model is called with labels, so that it computes what it adds to its loss; its own loss function
            is replaced meanwhile.
        leads: the model puts hidden states before those of the first label (prompt tokens, image patches).
        varentropy: with entropy, also compute the variance of ``log p_j`` under p.
    """

    labels: Tensor
    alignment: Alignment | None
    objective: Objective
    denominator: Tensor | int
    entropy: bool = False
    chunk_tokens: int | None = None
    extra: ExtraStatistics | None = None
    labelled: bool = False
    leads: bool = False
    varentropy: bool = False

    def targets(self, length: int) -> Tensor:
        """Return the label that each of ``length`` positions predicts, ``[B, length]``."""
        return self.labels if self.alignment is None else align_targets(self.labels, length, self.alignment)


class FusedHead:
    """Score batches inside the output layer of one model.

    Args:
        model: possibly wrapped; its core's output layer must be found by ``get_output_embeddings`` or ``lm_head``.

    Raises:
        FusedHeadError: if the model has no output layer of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.core = core_model(model)
        self._model = model
        self._checked: set[tuple[Any, ...]] = set()
        self._thread = 0
        self._grad_enabled = True
        self._compared = False
        self._request: ScoringRequest | None = None
        self._rows: ScoredRows | None = None
        self._result: tuple[TokenScores, Tensor] | None = None
        self._raw: Tensor | None = None
        self._node: Any = None
        self._vocab_sizes: dict[tuple[Any, ...], int] = {}
        self._layer: nn.Module = self._find_layer()
        self._core_forward = self._layer_forward = _outside_of_a_call
        # bound once: torch.compile would recompile for new method objects
        self._replacements = (self._score_model, self._score_layer)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], request: ScoringRequest) -> ScoredOutput:
        """Call the wrapped model on a batch and return the scores.

        Args:
            model: the model or a wrapper of it.
            batch: its inputs; with labels if and only if ``request.labelled``.
            request: what to score.

        Raises:
            FusedHeadError: if the model does not use its output layer as expected, or (at the first call) changes its
                logits in a way that the fused head does not reproduce.
        """
        with turn(self.core):
            self._model = model
            self._request, self._thread, self._grad_enabled = request, threading.get_ident(), torch.is_grad_enabled()
            # started now: the labels are known long before the device has computed the hidden states
            self._rows = ScoredRows(request.targets(request.labels.shape[-1]))
            key = self._state()
            self._compared = False
            try:
                with self._patched():
                    if request.labelled:
                        with replacement_of(self.core).active(self.core) as replacement:
                            output = model(**batch)
                        if replacement.calls != 1 and not is_compiled(model):
                            raise self._other_loss()
                    else:
                        output = model(**batch)
            finally:
                self._request = self._rows = self._result = self._raw = self._node = None
                self._core_forward = self._layer_forward = _outside_of_a_call
            if not isinstance(output, ScoredOutput):
                raise FusedHeadError(f"{type(model).__name__} returned {type(output).__name__} instead of the scores")
            if self._compared:
                self._checked.add(key)
            return output

    @property
    def checked(self) -> bool:
        """Return whether the model has passed the check in its present mode, with its present layer and hooks."""
        return self._state() in self._checked

    def _state(self) -> tuple[Any, ...]:
        layer = self._find_layer()
        return (self.core.training, id(layer), tuple(layer._forward_hooks), tuple(self.core._forward_hooks))

    def _find_layer(self) -> nn.Module:
        layer = output_layer(self.core)
        if layer is None:
            raise FusedHeadError(f"{type(self.core).__name__} has no output layer that get_output_embeddings() names")
        return layer

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        layer = self._layer = self._find_layer()  # PEFT may have changed it since
        modules = (self.core, layer)
        before = [vars(module).get("forward") for module in modules]
        self._core_forward, self._layer_forward = self.core.forward, layer.forward
        for module, replacement in zip(modules, self._replacements, strict=True):
            module.forward = replacement  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            for module, own in zip(modules, before, strict=True):
                if own is None:
                    del module.forward
                else:
                    module.forward = own  # type: ignore[method-assign]

    # ---- in place of the forwards ----------------------------------------------------------------------------------

    def _score_model(self, *args: Any, **kwargs: Any) -> ScoredOutput:
        return self._collect(self._core_forward(*args, **kwargs))

    # compiling would gain nothing here, and the options change from step to step, which would recompile
    @torch.compiler.disable
    def _score_layer(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if threading.get_ident() != self._thread:
            return self._layer_forward(hidden_states, *args, **kwargs)
        if self._result is not None:
            raise FusedHeadError(f"{type(self.core).__name__} uses its output layer more than once in a forward")
        if args or kwargs or not isinstance(hidden_states, Tensor):
            raise FusedHeadError("the output layer is called with more than hidden states")
        if self._grad_enabled and not torch.is_grad_enabled():
            raise FusedHeadError("the output layer is called without gradients (in a reentrant checkpoint, say)")
        request = self._request
        assert request is not None and self._rows is not None  # set by the call that we are in
        head = self._head(hidden_states)
        options = HeadOptions(
            request.objective, post_ops(self.core), request.entropy, request.chunk_tokens, extra=request.extra,
            varentropy=request.varentropy,
        )  # fmt: skip
        length = hidden_states.shape[-2]
        if request.alignment is not None and hidden_states.dim() == request.labels.dim() + 1:
            check_positions(self._model, request.labels, length, leads=request.leads)
        targets = request.targets(length).to(hidden_states.device)
        if targets.shape != hidden_states.shape[:-1]:
            raise FusedHeadError(
                f"the output layer is given hidden states of shape {tuple(hidden_states.shape)} for labels of shape "
                f"{tuple(targets.shape)}"
            )
        rows = self._rows.indices() if targets.shape == request.labels.shape else None
        tokens = TokenLabels.of(targets, head.vocab_size, IGNORE_INDEX, rows)
        scores = score_hidden(head, hidden_states, tokens, options, denominator=request.denominator)
        self._result = (scores, targets)
        rows = _some_rows(hidden_states)
        if self.checked:
            return output_of(scores.loss, rows.new_zeros(()).expand(*rows.shape[:-1], head.vocab_size))
        if isinstance(head, ModuleHead) and torch.is_grad_enabled():
            _refuse_foreign_parameters(self._layer_forward(rows), head, rows)
        with torch.no_grad():
            raw = self._layer_forward(rows)
        # in float32, rounding is small enough to notice even a factor of 0.999
        self._raw = raw if raw.dtype == torch.float64 else raw.float()
        output = output_of(scores.loss, self._raw)  # a copy: the model may go on with it in place
        self._node = output.grad_fn
        return output

    @torch.compiler.disable
    def _collect(self, output: Any) -> Any:
        if threading.get_ident() != self._thread:
            return output
        if self._result is None:
            if self._request is not None and self._request.labelled and not replacement_of(self.core).calls:
                raise self._other_loss()
            raise FusedHeadError(f"{type(self.core).__name__} makes its logits without calling its output layer")
        labelled = self._request is not None and self._request.labelled
        added, logits = loss_in(output) if labelled else None, logits_in(output)
        if self._raw is not None:
            self._compare(logits, self._raw)
            if depends_on(added, self._node):
                raise FusedHeadError(f"{type(self.core).__name__} adds to its loss what it makes of its logits")
        (scores, targets), self._result = self._result, None
        loss = loss_after(scores.loss, logits)
        assert loss is not None  # an objective was given
        aux_loss = getattr(output, "aux_loss", None)
        # a copy, because PEFT adds AdaLoRA's regularisation to it in place
        return ScoredOutput(
            **{**vars(scores), "loss": loss.clone()},
            targets=targets,
            added=added,
            aux_loss=aux_loss.detach() if isinstance(aux_loss, Tensor) else None,
            tokens_loss=loss,
        )

    def _other_loss(self) -> OtherLossError:
        return OtherLossError(f"{type(self.core).__name__} computes its loss in training without its loss function")

    def _head(self, hidden: Tensor) -> Head:
        layer = self._layer
        if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
            raise FusedHeadError("the output layer is sharded while it is called (tensor parallelism)")
        bias = added_bias(self.core)
        bias = None if bias is None else bias.to(hidden.device)
        if getattr(self._layer_forward, "__func__", None) is nn.Linear.forward:
            weight, own = layer.weight, cast("Tensor | None", layer.bias)
            if bias is not None:
                own = bias if own is None else own + bias
            return LinearHead(cast(Tensor, weight), own)
        if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
            # DeepSpeed releases the weights of the layer's parts before the gradients of a chunk are computed
            raise FusedHeadError("the output layer is more than one linear layer, and sharded by ZeRO-3")
        forward = self._layer_forward if bias is None else _biased(self._layer_forward, bias)
        key = (id(layer), *(tuple(parameter.shape) for parameter in layer.parameters()))
        if key not in self._vocab_sizes:
            with torch.no_grad():
                self._vocab_sizes = {key: forward(hidden.reshape(-1, hidden.shape[-1])[:1]).shape[-1]}
        return ModuleHead(forward, tuple(p for p in layer.parameters() if p.requires_grad), self._vocab_sizes[key])

    def _compare(self, logits: Any, raw: Tensor) -> None:
        bias = added_bias(self.core)
        mine = post_ops(self.core)(raw if bias is None else raw + bias.detach().to(raw.device))
        name = type(self.core).__name__
        if not isinstance(logits, Tensor) or logits.shape != mine.shape:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise FusedHeadError(f"{name} turns the output of its head {tuple(mine.shape)} into {shape}")
        known = set() if bias is None else {id(leaf) for leaf in leaves(bias, None)}
        if any(id(leaf) not in known for leaf in leaves(logits, self._node)):
            raise FusedHeadError(f"{name} has something trainable behind its output layer")
        if bool(torch.isnan(raw).any()):
            return  # with NaN in the weights nothing can be compared; the NaN loss is reported elsewhere
        real = logits.detach().to(raw.dtype)
        finite = torch.isfinite(mine)
        # both come from the same numbers, so they may differ only by the rounding of the post-ops
        largest = float(torch.where(torch.isfinite(raw), raw, 0.0).abs().max())
        tolerance = (16 if logits.dtype == raw.dtype else 2) * torch.finfo(logits.dtype).eps * largest
        difference = torch.where(finite & torch.isfinite(real), (real - mine).abs(), 0.0)
        if not torch.equal(finite, torch.isfinite(real)) or float(difference.max()) > tolerance:
            raise FusedHeadError(
                f"{name} does something to its logits that is not known here: they differ by up to "
                f"{float(difference.max()):.3g}"
            )
        self._compared = True


def _refuse_foreign_parameters(output: Tensor, head: ModuleHead, rows: Tensor) -> None:
    """Refuse a head whose output depends on a tensor besides its own parameters: its gradient would be lost."""
    known = {id(parameter) for parameter in head.parameters}
    # what lies behind the hidden states belongs to the model and gets its gradient there
    if any(id(leaf) not in known and leaf is not rows for leaf in leaves(output, rows.grad_fn)):
        raise FusedHeadError("the output layer depends on a tensor that is not among its parameters")


def _biased(forward: Callable[[Tensor], Tensor], bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda hidden: forward(hidden) + bias


def _some_rows(hidden: Tensor) -> Tensor:
    """Return a few rows of the first sample, spread over its length, ``[1, n, D]`` (``[n, D]`` for packed states)."""
    sample = hidden[:1] if hidden.dim() > 2 else hidden
    length = sample.shape[-2]
    places = torch.linspace(0, length - 1, min(_CHECKED_ROWS, length)).long().to(hidden.device)
    return sample.index_select(-2, places)


def _outside_of_a_call(*args: Any, **kwargs: Any) -> Any:
    raise FusedHeadError("the fused head is called outside of a scoring call")
