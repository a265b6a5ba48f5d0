"""Resona: a recurrence with a retrieval branch beside it, which attends to the passages of the past that fit a token (arXiv 2503.22913)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import find, system
from ..errors import divides
from ..ops.backend import accumulate_dtype
from ..ops.softmax import DEAD, attend
from ..span import Span, documents, positions
from ..state import Growing, State
from .base import Mixer


class ResonaState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    base: State  # the recurrence's
    open: Tensor  # [B, P - 1, dim], the last inputs; those of the passage that is not whole yet are among them
    open_at: Tensor  # [B, P - 1] int64, their positions, -1 for none
    keys: Growing  # [B, n, P, H, D], the whole passages of the document
    values: Growing  # [B, n, P, H, D]
    means: Growing  # [B, n, dim] float32, of the inputs of each passage, of length 1
    passage: Growing  # [B, n] int64, which passage of the document it is, -1 for none


@system(
    "resona",
    kind="external-memory",
    paper="arXiv:2503.22913",
    year=2025,
    name="Resona (retrieval beside a recurrence)",
    example={"passage": 8, "top": 2, "base": "mingru"},
    state="2 dim T + dim T / P + dim (P - 1), P = passage, and the recurrence's",
    parity="gate 0 gives the recurrence; top at least the number of passages gives cross-attention to all of them",
    claim="It mends the failure of a recurrence on MQAR and copying when the pairs exceed its state.",
)
class Resona(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; y_t = base(x)_t + g_t W_o Attention(W_q x_t, the tokens of the passages retrieved by x_t).

        passages p: P tokens of the document each, whole; k, v = W_k x, W_v x of their tokens; m_p = mean of their x
        retrieved: the `top` passages before the one that t is in, by cosine(x_t, m_p)        g_t = sigmoid(w . x_t - 4) at the start

    This is our reading: sizes, and which layers have the branch, are uncertain; keys are not rotated, since what is retrieved has no
    distance. A token with no whole passage behind it gets nothing from the branch. Choosing has no gradient. The state grows with the
    document. base: slug of the recurrence, with hyper-parameters `base_config`. heads: of the branch. passage: P.
    """

    def __init__(
        self,
        dim: int,
        base: str = "gated-deltanet",
        base_config: dict[str, Any] | None = None,
        heads: int = 4,
        passage: int = 64,
        top: int = 4,
    ):
        super().__init__()
        divides("heads", heads, "dim", dim)
        self.heads, self.passage, self.top = heads, passage, top
        self.base = find(base, ("mixer",)).builder(dim=dim, **(base_config or {}))
        self.to_q, self.to_kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.gate = nn.Linear(dim, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, -4.0)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: ResonaState | None = None, span: Span | None = None) -> tuple[Tensor, ResonaState]:
        P = self.passage
        state = state or self._fresh(x)
        at, doc = positions(state.seen, x.shape[1], span), documents(span)
        doc = torch.zeros_like(at) if doc is None else doc
        k_at = at if span is None or span.valid is None else torch.where(span.valid, at, DEAD)
        y, base = self.base(x, state.base, span)

        tokens, t_at = torch.cat([state.open, x], 1), torch.cat([state.open_at, k_at], 1)  # [B, P - 1 + T, ...]
        t_doc = F.pad(doc, (P - 1, 0))
        whole, index, w_doc = self._whole(tokens, k_at, doc)
        keys, values, means = state.keys, state.values, state.means
        passages = state.passage
        if index.shape[1]:
            k, v = self.to_kv(whole).unflatten(-1, (2, self.heads, -1)).unbind(3)  # [B, n, P, H, D]
            mean = F.normalize(whole.to(accumulate_dtype(x)).mean(2), dim=-1)
            keys, values, means, passages = keys.append(k), values.append(v), means.append(mean), passages.append(index)
        p_doc = F.pad(w_doc, (state.passage.length, 0))  # what is held belongs to the document that goes on
        if passages.length:
            o = self._attend(x, at // P, doc, keys.tensor, values.tensor, means.tensor, passages.tensor, p_doc)
            y = y + self.gate(x).sigmoid() * self.out(o.flatten(2))

        last = doc[:, -1:]
        dead = (passages.tensor < 0) | (p_doc != last)
        if passages.length and bool(dead.any()):  # let go of other documents: each row's own passages move to the right
            size = int((~dead).sum(1).max())
            order = (~dead).to(torch.int8).argsort(dim=1, stable=True)[:, passages.length - size :]
            index = passages.tensor.masked_fill(dead, DEAD).gather(1, order)
            keys, values, means = (Growing(_take(part.tensor, order)) for part in (keys, values, means))
            passages = Growing(index)
        recent = (t_at >= 0) & (t_at > (at[:, -1:] + 1 - P)) & (t_doc == last)
        order = recent.to(torch.int8).argsort(dim=1, stable=True)[:, tokens.shape[1] - P + 1 :]
        alive = recent.gather(1, order)
        return y, ResonaState(
            seen=at[:, -1] + 1,
            base=base,
            open=_take(tokens, order).masked_fill(~alive[..., None], 0),
            open_at=t_at.gather(1, order).masked_fill(~alive, DEAD),
            keys=keys,
            values=values,
            means=means,
            passage=passages,
        )

    def _fresh(self, x: Tensor) -> ResonaState:
        batch, _, dim = x.shape
        empty = x.new_zeros(batch, 0, self.passage, self.heads, dim // self.heads)
        return ResonaState(
            seen=torch.zeros(batch, dtype=torch.long, device=x.device),
            base=None,
            open=x.new_zeros(batch, self.passage - 1, dim),
            open_at=torch.full((batch, self.passage - 1), DEAD, device=x.device),
            keys=Growing(empty),
            values=Growing(empty),
            means=Growing(x.new_zeros(batch, 0, dim, dtype=accumulate_dtype(x))),
            passage=Growing(torch.zeros(batch, 0, dtype=torch.long, device=x.device)),
        )

    def _whole(self, tokens: Tensor, k_at: Tensor, doc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The passages that end in this call: their tokens [B, n, P, dim], number in the document [B, n] (-1: none), document [B, n]."""
        ends = (k_at >= 0) & ((k_at + 1) % self.passage == 0)  # [B, T]
        order = ends.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(ends.sum(1).max())]  # [B, n], of k_at
        place = order[..., None] + torch.arange(self.passage, device=order.device)  # of `tokens`: the end itself is P - 1 further on
        whole = _take(tokens, place.flatten(1)).unflatten(1, place.shape[1:])
        number = torch.where(ends.gather(1, order), k_at.gather(1, order) // self.passage, DEAD)
        return whole, number, doc.gather(1, order)

    def _attend(
        self, x: Tensor, chunk: Tensor, doc: Tensor, keys: Tensor, values: Tensor, means: Tensor, number: Tensor, p_doc: Tensor
    ) -> Tensor:
        """Cross-attention of each token to its retrieved passages, zero where there is none: [B, T, H, D]."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        with torch.no_grad():
            can = (number >= 0)[:, None] & (number[:, None] < chunk[..., None]) & (p_doc[:, None] == doc[..., None])  # [B, T, n]
            fit = (F.normalize(x.to(means.dtype), dim=-1) @ means.mT).masked_fill(~can, -torch.inf)
            best = fit.topk(min(self.top, fit.shape[-1]), dim=-1)
            found = best.values > -torch.inf
        if x.shape[1] == 1:  # one token: fetch what it reads, so that its cost does not grow with the document
            index = best.indices[:, 0]
            keys, values = _take(keys, index), _take(values, index)
            mask = found
        else:
            mask = torch.zeros_like(can).scatter(2, best.indices, found)
        mask = mask.repeat_interleave(self.passage, 2)
        any_ = found.any(-1)[..., None, None]
        o = attend(q, keys.flatten(1, 2), values.flatten(1, 2), mask | ~any_[..., 0], q.shape[-1] ** -0.5)
        return o.masked_fill(~any_, 0)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, ...], index [B, n] -> [B, n, ...]."""
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
