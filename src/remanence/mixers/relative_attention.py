"""Relative attention of Transformer-XL: content and distance score apart; its state is a cache of keys (arXiv 1901.02860)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import divides
from ..ops.softmax import DEAD, visible
from ..span import Span, documents, positions
from ..state import Growing, State
from .base import Mixer


class RelativeAttentionState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    keys: Growing | Tensor  # [B, n, H, D]
    values: Growing | Tensor  # [B, n, H, D]
    at: Growing | Tensor  # [B, n] int64, position of each key in its document; -1 is one that nothing may see


def sinusoids(length: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """R_p = [sin(p f_0), .., sin(p f_{dim/2-1}), cos(p f_0), ..] with f_t = 10000^(-2t/dim), for p = 0..length - 1: [length, dim]."""
    freq = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * freq
    return torch.cat([angle.sin(), angle.cos()], 1).to(dtype)


def _extend(past: Growing | Tensor, new: Tensor) -> Growing:
    return past.append(new) if isinstance(past, Growing) else Growing(torch.cat([past, new], 1))


@system(
    "relative-attention", kind="mixer", paper="arXiv:1901.02860", year=2019, name="Transformer-XL attention", example={"heads": 2},
    state="T dim, bounded by the cache", parity="the equation in a loop",
    claim="",
)  # fmt: skip
class RelativeAttention(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; o_i = sum_j softmax_j(s_ij) v_j over j <= i, then W_o.

        s_ij = ((q_i + u) . k_j + (q_i + v) . W_r R_{i-j}) / sqrt(D)         R: see `sinusoids`

    u, v [H, D] and W_r are this layer's own (the paper's untie_r). heads: H. window: a token sees the last `window` tokens, itself
    included (the paper's same_length); None sees all. All weights start as N(0, 0.02). Keys hold no position, so what is cached is valid
    at any distance. The state grows by 2 x dim numbers a token without a window and is bounded with one. dim must be even.
    """

    def __init__(self, dim: int, heads: int = 4, window: int | None = None):
        super().__init__()
        divides("heads", heads, "dim", dim)
        divides("2 (a sine and a cosine a frequency)", 2, "dim", dim)
        self.heads, self.head_dim, self.window = heads, dim // heads, window
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_r = nn.Linear(dim, dim, bias=False)
        self.u = nn.Parameter(torch.empty(heads, self.head_dim))
        self.v = nn.Parameter(torch.empty(heads, self.head_dim))
        self.out = nn.Linear(dim, dim, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(
        self, x: Tensor, state: RelativeAttentionState | None = None, span: Span | None = None
    ) -> tuple[Tensor, RelativeAttentionState]:
        batch, length, dim = x.shape
        seen = state.seen if state else torch.zeros(batch, dtype=torch.long, device=x.device)
        at, doc = positions(seen, length, span), documents(span)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.to_qkv(x).chunk(3, -1))  # [B, T, H, D]
        k_at = at if span is None or span.valid is None else torch.where(span.valid, at, DEAD)
        past = state or self._empty(k, k_at)
        keys, values, k_all = _extend(past.keys, k), _extend(past.values, v), _extend(past.at, k_at)
        k_doc = None if doc is None else F.pad(doc, (k_all.length - length, 0))  # what was cached belongs to document 0 of the call
        distances = min(self.window or k_all.length, k_all.length)  # every key of the document is cached: no distance is longer
        table = sinusoids(distances, dim, x.device, x.dtype)  # [P, dim]
        # without a window all queries at once; with one, in blocks that see `size + window - 1` keys each: cost T x window
        size, reach = (length, k_all.length) if self.window is None else (max(self.window, 32), max(self.window, 32) + self.window - 1)
        outputs = []
        for start in range(0, length, size):
            ask, see = slice(start, start + size), slice(start, start + reach)
            docs = (None, None) if doc is None or k_doc is None else (doc[:, ask], k_doc[:, see])
            mask = visible(at[:, ask], k_all.tensor[:, see], *docs, self.window, 0)
            distance = at[:, ask, None] - k_all.tensor[:, None, see]
            outputs.append(self._attend(q[:, ask], keys.tensor[:, see], values.tensor[:, see], mask, distance, table))
        o = torch.cat(outputs, 1)
        kept = self._keep(keys, values, k_all, at, doc, k_doc, span)
        return self.out(o.flatten(2)), RelativeAttentionState(seen=at[:, -1] + 1, keys=kept[0], values=kept[1], at=kept[2])

    def _empty(self, k: Tensor, k_at: Tensor) -> RelativeAttentionState:
        """The cache of a fresh start: with a window always window - 1 entries, dead ones where there are fewer."""
        size = 0 if self.window is None else self.window - 1
        empty, dead = k.new_zeros(len(k), size, *k.shape[2:]), k_at.new_full((len(k), size), DEAD)
        if self.window is not None:
            return RelativeAttentionState(seen=k_at, keys=empty, values=empty, at=dead)
        return RelativeAttentionState(seen=k_at, keys=Growing(empty), values=Growing(empty), at=Growing(dead))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, distance: Tensor, table: Tensor) -> Tensor:
        """q [B, Tq, H, D]; k, v [B, Tk, H, D]; mask, distance [B, Tq, Tk]; table [P, dim] -> [B, Tq, H, D]."""
        weight = self.to_r.weight.to(table.dtype).unflatten(0, (self.heads, self.head_dim))  # [H, D, dim]
        content, place = q + self.u.to(q.dtype), q + self.v.to(q.dtype)
        if q.shape[1] < self.head_dim:  # few queries: project them back rather than the whole table forth
            score = torch.einsum("bihc,pc->bhip", torch.einsum("bihd,hdc->bihc", place, weight), table)
        else:
            score = torch.einsum("bihd,phd->bhip", place, torch.einsum("hdc,pc->phd", weight, table))
        index = distance.clamp(0, len(table) - 1)[:, None].expand(-1, self.heads, -1, -1)
        bias = score.gather(3, index) * self.head_dim**-0.5  # [B, H, Tq, Tk]
        mask = mask | ~mask.any(-1, keepdim=True)  # a padded query sees anything rather than nothing: no NaN
        bias = bias.masked_fill(~mask[:, None], -torch.inf).to(content.dtype)
        return F.scaled_dot_product_attention(content.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias).transpose(1, 2)

    def _keep(
        self, keys: Growing, values: Growing, k_at: Growing, at: Tensor, doc: Tensor | None, k_doc: Tensor | None, span: Span | None
    ) -> tuple[Growing | Tensor, Growing | Tensor, Growing | Tensor]:
        """What later tokens may still see: the current document's keys, or the last window - 1 of them, each row's pushed to the right."""
        if span is None:
            if self.window is None:
                return keys, values, k_at
            start = keys.length - self.window + 1
            return keys.tensor[:, start:], values.tensor[:, start:], k_at.tensor[:, start:]
        alive = k_at.tensor >= 0
        if doc is not None and k_doc is not None:
            alive = alive & (k_doc == doc[:, -1:])
        if self.window is None:
            size = int(alive.sum(1).max())
        else:
            size = self.window - 1
            alive = alive & (k_at.tensor > at[:, -1:] - size)
        order = alive.to(torch.int8).argsort(dim=1, stable=True)[:, keys.length - size :]
        pick = order[..., None, None].expand(-1, -1, self.heads, self.head_dim)
        kept = keys.tensor.gather(1, pick), values.tensor.gather(1, pick), torch.where(alive, k_at.tensor, DEAD).gather(1, order)
        return kept if self.window is not None else (Growing(kept[0]), Growing(kept[1]), Growing(kept[2]))
