"""Just read twice: prefix linear attention (PLA), which reads a prompt in both directions, and JRT-Prompt (arXiv 2407.05483)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import ShapeError, UsageError, positive
from ..ops.backend import accumulate_dtype
from ..span import Span
from ..state import State
from .based import Based, BasedState, beside_one, taylor


@system(
    "jrt",
    kind="mixer",
    paper="arXiv:2407.05483",
    year=2024,
    name="JRT (prefix linear attention)",
    example={"feature_dim": 6},
    state="H F (D + 1), F = (d + 1)(d + 2) / 2, d = feature_dim, D = dim / H",
    parity="the quadratic form of the released code's 'default' implementation; without a prefix, Based",
    claim="On set disjointness the order of the two lists no longer matters.",
)
class PrefixLinearAttention(Based):
    """x [B, T, dim] -> y [B, T, dim]: Based, except over a prefix, whose tokens are also summed with keys and values of their own.

        o_t = phi(q_t) . (sum_{s <= t} phi(k_s) v_s + sum_{s < M} phi(k^e_s) v^e_s) / phi(q_t) . (the same sums without v)

    for all t, those of the prefix included. Both sums are one memory, so after the prefix it is Based, step by step, and obeys its laws:
    a plain call is the causal stream, with k^e = 0. A prefix is read by `read_prefix`, all of it in one call, because no part of it has an
    output before its end; a model that holds such layers reads one by `with prefix(model): out = model(ids)`. Sizes as in Based.
    """

    def __init__(self, dim: int, heads: int = 4, feature_dim: int = 16, backend: str = "auto"):
        super().__init__(dim, heads, feature_dim, backend)
        self.to_kv_prefix = nn.Linear(dim, self.sizes[1] + self.sizes[2], bias=False)

    def read_prefix(self, x: Tensor, state: BasedState | None = None, span: Span | None = None) -> tuple[Tensor, State]:
        """Read x [B, M, dim] as a prefix. One document a row: a reset anywhere but on its first token raises UsageError.

        After a state the prefix adds to what that state holds. Padding counts for nothing; the released code zeroes padded keys before
        the feature map, which leaves each the weight phi(q) . phi(0) = 1.
        """
        with prefix(self):
            return self(x, state, span)

    def _encode(self, x: Tensor, state: BasedState | None, span: Span | None) -> tuple[Tensor, BasedState]:
        """`forward` over a prefix: what the causal sums start from already holds the prefix's."""
        k, v = self.to_kv_prefix(x).to(accumulate_dtype(x)).split(self.sizes[1:], -1)
        k, v = taylor(k.unflatten(-1, (self.heads, -1))), beside_one(v.unflatten(-1, (self.heads, -1)))  # [B, M, H, F or D + 1]
        if span is not None and span.valid is not None:
            k = k * span.valid[..., None, None]
        memory = torch.einsum("bthf,bthd->bhfd", k, v)
        seen = None if state is None else state.seen
        if state is not None:
            before = state.memory
            if span is not None and span.reset is not None:
                before, seen = before.masked_fill(span.reset[:, :1, None, None], 0), state.seen.masked_fill(span.reset[:, 0], 0)
            memory = memory + before
        if span is not None and span.reset is not None:
            if bool(span.reset[:, 1:].any()):
                raise UsageError("a document starts in the middle of the prefix; a prefix is one document a row, read in one call.")
            span = Span(span.valid)
        return self.read(x, seen, memory, span)


@contextmanager
def prefix(model: nn.Module) -> Iterator[None]:
    """Inside, every PrefixLinearAttention of `model` takes what it is given for a prefix; all other layers read it as ever.

    Raises UsageError if there is none. One thread at a time: the layers' `forward` is replaced meanwhile.
    """
    layers = [module for module in model.modules() if isinstance(module, PrefixLinearAttention)]
    if not layers:
        raise UsageError(f"this {type(model).__name__} holds no prefix linear attention; give it layers of 'jrt'.")
    for layer in layers:
        layer.__dict__["forward"] = layer._encode
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def jrt_loss(
    model: nn.Module,
    ids: Tensor,
    length: int,
    mask_id: int,
    mlm_weight: float = 0.25,
    mask_rate: float = 0.15,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The training loss of JRT-RNN over ids [B, T]: next tokens after the prefix ids[:, :length], plus mlm_weight times masked ones in it.

    `mask_rate` of the prefix's tokens are replaced by `mask_id` before it is read, and predicted where they stood. The prefix has no
    next-token loss: its sums see the labels. The first token after it is read but not predicted, as in the released code, whose sum of
    the two losses this is (the paper divides by the sum of the weights). Raises UsageError on a length outside 1 .. T - 2.
    """
    if not 1 <= length <= ids.shape[1] - 2:
        raise UsageError(f"length is {length}; of {ids.shape[1]} tokens a prefix must leave two: 1..{ids.shape[1] - 2}.")
    masked = torch.rand(len(ids), length, generator=generator).to(ids.device) < mask_rate
    start, rest = ids[:, :length], ids[:, length:]
    with prefix(model):
        read = model(start.masked_fill(masked, mask_id), logits="none")
    targets = F.pad(rest[:, 1:], (0, 1), value=-100)
    loss = model(rest, read.state, targets=targets, logits="none").loss
    if not bool(masked.any()):
        return loss
    head: Any = model.head
    return loss + mlm_weight * F.cross_entropy(head(read.hidden[masked]).float(), start[masked])


def jrt_prompt(ids: Tensor, times: int = 2) -> Tensor:
    """JRT-Prompt: ids [B, T] -> [B, times T], the prompt (context and question) said again, for any causal model. No training."""
    positive(times=times)
    if ids.ndim != 2:
        raise ShapeError(f"ids have shape {list(ids.shape)}; expected [B, T].")
    return ids.repeat(1, times)
