"""Softmax attention with grouped keys, rotary positions, and optionally a window and sinks; the state is its key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..catalog import system
from ..errors import UsageError, divides
from ..ops.softmax import DEAD, attend, local, visible
from ..span import Span, documents, positions
from ..state import Growing, State
from .base import Mixer


class AttentionState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    keys: Growing | Tensor  # [B, n, G, D], rotated to their positions
    values: Growing | Tensor  # [B, n, G, D]
    at: Growing | Tensor  # [B, n] int64, position of each key in its document; -1 is one that nothing may see


class _Rotate(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) on the halves of x [B, T, H, D]; the gradient is the rotation back. First order only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)  # filled in place: no halves to be joined again
        (a, b), (c, d) = x.chunk(2, -1), y.chunk(2, -1)
        torch.mul(a, cos, out=c).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=d).addcmul_(a, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(dy, cos, -sin), None, None  # type: ignore[return-value]


def rotate(x: Tensor, position: Tensor, theta: float, dims: int) -> Tensor:
    """Rotary embedding of the first `dims` of x [B, T, H, D] by position [B, T]; halves are paired (i, i + dims / 2).

    Angles are taken in float64: at position 1e6 a float32 angle is off by 0.06 rad, and a stream has no last position.
    """
    freq = theta ** (-torch.arange(0, dims, 2, device=x.device, dtype=torch.float64) / dims)
    angle = position[..., None].double() * freq  # [B, T, dims / 2]
    cos, sin = angle.cos().to(x.dtype)[:, :, None], angle.sin().to(x.dtype)[:, :, None]
    if dims == x.shape[-1]:
        return _Rotate.apply(x, cos, sin)  # type: ignore[return-value]
    return torch.cat([_Rotate.apply(x[..., :dims], cos, sin), x[..., dims:]], -1)  # type: ignore[list-item]


@system(
    "attention", kind="mixer", paper="arXiv:1706.03762", year=2017, name="Attention (GQA, RoPE, window, sinks)",
    state="2 T G D, or 2 (window - 1 + sinks) G D with a window", parity="transformers LlamaAttention",
    claim="Recall is perfect while the state grows with the text",
)  # fmt: skip
class Attention(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j over j <= i, then W_o.

    heads: H. kv_heads: G dividing H (arXiv 2305.13245), default H. window: a token sees the last `window` tokens, itself included, and
    the first `sinks` of its document (arXiv 2309.17453, keeping absolute rotations); None sees all. rope: fraction of D that is rotated
    (arXiv 2104.09864), 0 for none. The state grows by G x D x 2 numbers a token without a
    window and is bounded by window + sinks with one.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        sinks: int | None = None,
        rope: float = 1.0,
        theta: float = 10000.0,
        bias: bool = False,
    ):
        super().__init__()
        if head_dim is None:
            divides("heads", heads, "dim", dim)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim or dim // heads
        divides("kv_heads", self.kv_heads, "heads", heads)
        if sinks and window is None:
            raise UsageError(f"sinks={sinks} needs a window; without one every token is seen anyway.")
        self.rope_dims = int(self.head_dim * rope) // 2 * 2
        self.window, self.sinks, self.theta = window, sinks or 0, theta
        self.sizes = [heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        self.to_qkv = nn.Linear(dim, sum(self.sizes), bias=bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=bias)

    def forward(self, x: Tensor, state: AttentionState | None = None, span: Span | None = None) -> tuple[Tensor, AttentionState]:
        batch, length, _ = x.shape
        seen = state.seen if state else torch.zeros(batch, dtype=torch.long, device=x.device)
        at, doc = positions(seen, length, span), documents(span)
        qk, v = self.to_qkv(x).unflatten(-1, (-1, self.head_dim)).split([self.heads + self.kv_heads, self.kv_heads], 2)
        if self.rope_dims:
            qk = rotate(qk, at, self.theta, self.rope_dims)
        q, k = qk.split([self.heads, self.kv_heads], 2)  # [B, T, H or G, D]
        k_at = at if span is None or span.valid is None else torch.where(span.valid, at, DEAD)
        scale = self.head_dim**-0.5
        if self.window is None:
            o, cache = self._all(q, k, v, at, k_at, doc, state, span, scale)
        else:
            o, cache = self._windowed(q, k, v, at, k_at, doc, state, self.window, scale)
        keys, values, alive = cache
        return self.out(o.flatten(2)), AttentionState(seen=at[:, -1] + 1, keys=keys, values=values, at=alive)

    def _all(self, q, k, v, at, k_at, doc, state, span, scale):
        """Full attention; the cache is append-only, so growing it is O(1) amortised."""
        if state is None:
            cache = Growing(k), Growing(v), Growing(k_at)
            mask = None if span is None else visible(at, k_at, doc, doc, None, 0)
        else:
            past_at = state.at.tensor
            cache = state.keys.append(k), state.values.append(v), state.at.append(k_at)
            k_doc = None if doc is None else torch.cat([torch.zeros_like(past_at), doc], 1)
            mask = visible(at, cache[2].tensor, doc, k_doc, None, 0)
        if mask is not None:
            mask = mask | ~mask.any(-1, keepdim=True)  # a padded query sees anything rather than nothing: no NaN
        o = attend(q, cache[0].tensor, cache[1].tensor, mask, scale)
        if doc is not None:  # let go of documents that are over: each row's live keys move to the right, as wide as the longest row's
            past = 0 if state is None else state.at.length
            last = doc[:, -1:]
            old_dead = torch.where(last > 0, DEAD, cache[2].tensor[:, :past])
            new_dead = torch.where(doc == last, k_at, DEAD)
            alive = torch.cat([old_dead, new_dead], 1)
            size = int((alive >= 0).sum(1).max())
            order = (alive >= 0).to(torch.int8).argsort(dim=1, stable=True)[:, alive.shape[1] - size :]
            pick = order[..., None, None].expand(-1, -1, *k.shape[2:])
            cache = Growing(cache[0].tensor.gather(1, pick)), Growing(cache[1].tensor.gather(1, pick)), Growing(alive.gather(1, order))
        return o, cache

    def _windowed(self, q, k, v, at, k_at, doc, state, window: int, scale):
        """Window and sinks; the cache keeps `window - 1` recent keys and the sinks, dead entries where there are fewer."""
        keep = window - 1 + self.sinks
        batch, length, groups, width = k.shape
        if state is None:
            past = k.new_zeros(batch, keep, groups, width), v.new_zeros(batch, keep, groups, width), k_at.new_full((batch, keep), DEAD)
        else:
            past = state.keys, state.values, state.at
        keys, values, k_all = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1), torch.cat([past[2], k_at], 1)
        k_doc = None if doc is None else torch.cat([torch.zeros_like(past[2]), doc], 1)
        if self.sinks == 0 and length > 1:
            o = local(q, keys, values, at, k_all, doc, k_doc, window, scale)
        else:
            mask = visible(at, k_all, doc, k_doc, window, self.sinks)
            o = attend(q, keys, values, mask | ~mask.any(-1, keepdim=True), scale)
        if doc is None and self.sinks == 0 and (k_at is at):
            start = keys.shape[1] - keep  # cloned, so that a state that is kept does not keep the whole call's keys alive
            return o, (keys[:, start:].clone(), values[:, start:].clone(), k_all[:, start:].clone())
        # what the next token may still see: the current document's sinks and last window - 1 keys; stable sort puts them last, in order
        alive = (k_all >= 0) & ((k_all > at[:, -1:] - window + 1) | (k_all < self.sinks))
        if doc is not None:
            alive = alive & (k_doc == doc[:, -1:])
        order = alive.to(torch.int8).argsort(dim=1, stable=True)[:, keys.shape[1] - keep :]
        pick = order[..., None, None].expand(-1, -1, groups, width)
        k_all = torch.where(alive, k_all, DEAD)
        return o, (keys.gather(1, pick), values.gather(1, pick), k_all.gather(1, order))

