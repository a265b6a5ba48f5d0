"""Stuffed Mamba: watch a recurrent state past the training length, and keep it from collapsing without training (arXiv 2410.07145)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import ShapeError, UsageError, positive
from ..mixers import Mixer
from ..models import Model
from ..ops.backend import accumulate_dtype
from ..ops.outer import outer
from ..span import Span, positions
from ..state import State

Fix = Callable[[State], State]
Rule = Callable[..., Any]


@dataclass(frozen=True)
class Trace:
    """Statistics of a state along a stream. tokens [n]: read so far. loss [n]: mean cross-entropy of the piece that ends there.

    moments: for every floating tensor of the state, by its dotted name, [n, heads, 3]: mean, variance and largest magnitude of each head
    over all rows. A tensor called `memory` [B, H, ...] has H heads, any other is taken whole, as one.
    """

    tokens: Tensor
    loss: Tensor
    moments: dict[str, Tensor]

    def growth(self, tokens: int) -> dict[str, Tensor]:
        """Variance at the end over variance after the first `tokens` (the training length), [heads]: collapse is a few heads' explosion."""
        at = int((self.tokens <= tokens).sum()) - 1
        if at < 0:
            raise UsageError(f"tokens is {tokens}; the first record was made after {int(self.tokens[0])}.")
        return {name: m[-1, :, 1] / m[at, :, 1].clamp(min=1e-12) for name, m in self.moments.items()}


def _is_memory(name: str) -> bool:
    return name.rpartition(".")[2] == "memory"


def moments(state: State) -> dict[str, Tensor]:
    """Mean, variance and largest magnitude of each head of every floating tensor of a state, [heads, 3], by dotted name."""
    found = {}
    for name, tensor in state.named_tensors():
        if tensor.is_floating_point() and tensor.numel():
            heads = (tensor.movedim(1, 0).flatten(1) if _is_memory(name) and tensor.ndim > 2 else tensor.reshape(1, -1)).float()
            found[name] = torch.stack([heads.mean(1), heads.var(1, unbiased=False), heads.abs().amax(1)], 1)
    return found


@system(
    "stuffed-mamba",
    kind="interpretability",
    paper="arXiv:2410.07145",
    year=2024,
    name="Stuffed Mamba (state collapse)",
    parity="a window by state difference against reading from t - r with an empty state",
    claim="A byte-level Mamba-2 trained at 256 tokens collapses at 1k to 4k, and a window or a bound on the state's norm mends its loss.",
)
@torch.no_grad()
def record(model: Model, ids: Tensor, every: int = 256, state: State | None = None, fix: Fix | None = None) -> Trace:
    """Read ids [B, T] in pieces of `every` tokens and write down loss and state statistics after each; nothing of the past is kept.

    fix(state) -> state, if given, is applied between the pieces (`clip_norm`). The loss of a piece is that of its own next tokens.
    """
    positive(every=every)
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ShapeError(f"ids have shape {list(ids.shape)}; expected [B, T] with T >= 2.")
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    tokens, losses, kept = [], [], []
    for start in range(0, ids.shape[1] - 1, every):
        part = slice(start, min(start + every, ids.shape[1] - 1))
        out = model(ids[:, part], state, targets=targets[:, part], logits="none")
        held = fix(out.state) if fix else out.state
        tokens.append(part.stop)
        losses.append(out.loss)
        kept.append(moments(held))
        state = held
    return Trace(torch.tensor(tokens), torch.stack(losses).cpu(), {name: torch.stack([m[name] for m in kept]) for name in kept[0]})


def clip_norm(state: State, limit: float) -> State:
    """h <- h min(1, limit / |h|) for each head's matrix: every floating tensor [B, H, K, V] called `memory`, at any depth of the state."""
    if not limit > 0:
        raise UsageError(f"limit is {limit}; it must be above 0.")
    clipped = []
    for name, tensor in state.named_tensors():
        if _is_memory(name) and tensor.ndim == 4:
            norm = tensor.norm(dim=(-2, -1), keepdim=True)
            tensor = tensor * (limit / norm.clamp(min=1e-30)).clamp(max=1)
        clipped.append(tensor)
    values = iter(clipped)
    return state.map(lambda _: next(values))


@contextmanager
def rewired(model: nn.Module, **rules: Rule) -> Iterator[None]:
    """Inside, the mixers of `model` that call the op `outer` or `delta` call rules[name](op, q, k, v, ...) in its place.

    Their methods are replaced by the same code with another meaning of that name: weights, states and other models are untouched. Raises
    UsageError where no mixer calls such an op.
    """
    changed = [(mixer, name, method) for mixer in model.modules() if isinstance(mixer, Mixer) for name, method in _methods(mixer, rules)]
    if not changed:
        raise UsageError(f"no mixer of this {type(model).__name__} is built on {' or '.join(rules)}; this fix is for those that are.")
    for mixer, name, method in changed:
        mixer.__dict__[name] = method
    try:
        yield
    finally:
        for mixer, name, _ in changed:
            mixer.__dict__.pop(name, None)


def _methods(mixer: Mixer, rules: dict[str, Rule]) -> Iterator[tuple[str, MethodType]]:
    """The methods of a mixer that call one of the ops, as they are with the rules in place of these."""
    for name in dir(type(mixer)):
        method = getattr(type(mixer), name)
        if isinstance(method, FunctionType):
            used = [rule for rule in rules if rule in method.__code__.co_names and rule in method.__globals__]
            if used:
                space = method.__globals__ | {rule: partial(rules[rule], method.__globals__[rule]) for rule in used}
                copy = FunctionType(method.__code__, space, method.__name__, method.__defaults__, method.__closure__)
                copy.__kwdefaults__ = method.__kwdefaults__
                yield name, MethodType(copy, mixer)


@contextmanager
def forget_more(model: nn.Module, retention: float = 1.0, insertion: float = 1.0) -> Iterator[None]:
    """Inside, every decay of the model's `outer` and `delta` layers is `retention` times what it was, and every write `insertion` times.

    Both in 0..1, to be tuned. For `outer` the write is k v^T, for `delta` the rate beta.
    """
    for name, value in (("retention", retention), ("insertion", insertion)):
        if not 0 < value <= 1:
            raise UsageError(f"{name} is {value}; it must be above 0 and at most 1.")

    def lower(log_decay: Tensor | None, v: Tensor) -> Tensor:
        return (v.new_zeros(v.shape[:3], dtype=accumulate_dtype(v)) if log_decay is None else log_decay) + math.log(retention)

    def added(op: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *rest: Any, **named: Any) -> Any:
        return op(q, k, v * insertion, lower(log_decay, v), *rest, **named)

    def corrected(op: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, *rest: Any, **named: Any) -> Any:
        return op(q, k, v, lower(log_decay, v), beta * insertion, *rest, **named)

    with rewired(model, outer=added, delta=corrected):
        yield


def windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial: Tensor | None = None,
    span: Span | None = None,
    backend: str = "auto",
    *,
    window: int,
) -> tuple[Tensor, Tensor]:
    """`outer` over the last `window` = r tokens only, exactly: what r tokens read from an empty state would leave. Shapes as in `outer`.

        S^r_t = S_t - a_(t-r+1) .. a_t S_(t-r) = a_t S^r_(t-1) + k_t v_t^T - (a_(t-r+1) .. a_t) k_(t-r) v_(t-r)^T

    The second form is a recurrence with two writes a token, so it is run as one over 2 T, and nothing grows that is to cancel later. It
    needs the tokens that leave: `initial` must be None (UsageError), a document is read in one call.
    """
    positive(window=window)
    if initial is not None:
        raise UsageError("a sliding window needs the tokens that leave it, which no state holds; read the document in one call.")
    dtype, length = accumulate_dtype(q, k, v), v.shape[1]
    g = v.new_zeros(v.shape[:3], dtype=dtype) if log_decay is None else log_decay.to(dtype)

    def past(x: Tensor) -> Tensor:  # x_(t - r), zeros before the first
        return F.pad(x, (0, 0) * (x.ndim - 2) + (window, 0))[:, :length]

    leaves = positions(torch.zeros(len(v), dtype=torch.long, device=v.device), length, span) >= window  # [B, T]: t - r is of the document
    total = (g if span is None or span.valid is None else g * span.valid.reshape(*leaves.shape, *[1] * (g.ndim - 2))).double().cumsum(1)
    kept = (total - past(total)).clamp(max=0).exp().to(dtype) * leaves.reshape(*leaves.shape, *[1] * (g.ndim - 2))
    k_old, v_old = past(k).to(dtype), -past(v).to(dtype)
    k_old, v_old = (k_old * kept, v_old) if g.ndim == 4 else (k_old, v_old * kept[..., None])

    def pairs(first: Tensor, second: Tensor) -> Tensor:  # [B, T, ...] twice -> [B, 2 T, ...]
        return torch.stack([first, second], 2).flatten(1, 2)

    if span is not None:
        valid = None if span.valid is None else pairs(span.valid, span.valid)
        span = Span(valid, None if span.reset is None else pairs(span.reset, torch.zeros_like(span.reset)))
    o, S = outer(
        pairs(q, q).to(dtype), pairs(k_old, k.to(dtype)), pairs(v_old, v.to(dtype)), pairs(g, torch.zeros_like(g)), None, span, backend
    )
    return o[:, 1::2].to(v.dtype), S


@contextmanager
def sliding_window(model: nn.Module, window: int) -> Iterator[None]:
    """Inside, the model's `outer` layers hold the last `window` tokens alone (`windowed`): a document must be read in one call."""

    def rule(op: Any, *args: Any, **named: Any) -> Any:
        if len(args) > 7 or named.pop("bonus", None) is not None:
            raise UsageError("a layer gives the current token a bonus; a window by state difference is for those without.")
        return windowed(*args, **named, window=window)

    with rewired(model, outer=rule):
        yield
