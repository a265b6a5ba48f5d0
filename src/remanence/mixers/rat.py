"""RAT: a gated average inside every chunk of L tokens, attention over the chunks before it (arXiv 2507.04416)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import divides
from ..ops.backend import accumulate_dtype
from ..ops.scan import scan
from ..ops.softmax import DEAD
from ..span import Span, documents, positions
from ..state import Growing, State
from .attention import rotate
from .base import Mixer
from .parts import no_decay


class RATState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    open: Tensor  # [B, 2 D] float32, the averages of x and of k in the chunk that is being read
    keys: Growing  # [B, n, H, D / H], of the finished chunks, rotated by their index
    values: Growing  # [B, n, H, D / H]
    chunks: Growing  # [B, n] int64, index of each finished chunk in its document; -1 is one that nothing may see


@system(
    "rat",
    kind="mixer",
    paper="arXiv:2507.04416",
    year=2025,
    name="RAT (recurrence and attention)",
    example={"chunk": 6},
    state="2 D (1 + T / L)",
    parity="the equations with a T x (T / L) mask in torch; chunk = 1 against softmax attention, chunk >= T against the gated recurrence",
    claim="Between a recurrence and attention in quality as L grows, on character-level text; attends to T / L keys.",
)
class RAT(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state grows by one key and value a head for every finished chunk.

        u_t = g_t u_{t-1} + (1 - g_t) x_t,  c_t likewise of k_t, both from zero at a chunk's first token        g = sigmoid(W_g x + b_g)
        o_t = softmax([q_t . c_j, q_t . c_t] / sqrt(D)) [u_j, u_t],  j the last tokens of the chunks before t's
        y = W_o (sigmoid(z) * o)

    x, k, q, z = W x. heads: H. groups: of q and k, dividing H; head h reads group h mod groups, the gates are those of its own channels.
    chunk: L, counted from the document's first token. q and c are rotated by the index of their chunk. chunk=1 is attention over
    (1 - g) x with keys (1 - g) k; a chunk as long as the document is the recurrence alone. b_g starts as log U(1, L - 1).
    """

    def __init__(self, dim: int, heads: int = 4, groups: int = 2, chunk: int = 16, theta: float = 10000.0, backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        divides("groups", groups, "heads", heads)
        self.heads, self.groups, self.chunk, self.theta, self.backend = heads, groups, chunk, theta, backend
        self.head_dim = dim // heads
        self.sizes = [dim, dim, dim, groups * self.head_dim, groups * self.head_dim]  # z, x, g, q, k
        self.to_zxgqk = nn.Linear(dim, sum(self.sizes), bias=False)
        self.gate_bias = no_decay(nn.Parameter(torch.empty(dim).uniform_(1, max(chunk - 1, 1)).log()))
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: RATState | None = None, span: Span | None = None) -> tuple[Tensor, RATState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        valid, doc = None if span is None else span.valid, documents(span)
        full = accumulate_dtype(x)
        z, u, g, q, k = self.to_zxgqk(x).split(self.sizes, -1)
        g = g.to(full) + self.gate_bias.to(full)
        starts = at % self.chunk == 0
        inside = Span(valid, starts if valid is None else starts & valid)
        values = torch.cat([u, k.repeat(1, 1, self.heads // self.groups)], -1)
        h, last = scan(F.logsigmoid(g).repeat(1, 1, 2), (-g).sigmoid().repeat(1, 1, 2) * values, state and state.open, inside, self.backend)
        u, c = h.to(x.dtype).unflatten(-1, (2, self.heads, -1)).unbind(2)  # [B, T, H, D / H]

        index = at // self.chunk
        rotary = self.head_dim // 2 * 2
        q = rotate(q.unflatten(-1, (self.groups, -1)), index, self.theta, rotary).repeat(1, 1, self.heads // self.groups, 1)
        c = rotate(c, index, self.theta, rotary)
        closed = at % self.chunk == self.chunk - 1
        keys, vals, chunks, document = self._finished(c, u, index, closed if valid is None else closed & valid, state, doc)
        o = self._attend(q, c, u, keys.tensor, vals.tensor, self._visible(index, chunks.tensor, doc, document))
        if doc is not None and document is not None:
            keys, vals, chunks = self._let_go(keys, vals, chunks, document == doc[:, -1:])
        y = self.out(z.sigmoid() * o.flatten(2))
        return y, RATState(seen=at[:, -1] + 1, open=last, keys=keys, values=vals, chunks=chunks)

    @staticmethod
    def _finished(
        c: Tensor, u: Tensor, index: Tensor, closed: Tensor, state: RATState | None, doc: Tensor | None
    ) -> tuple[Growing, Growing, Growing, Tensor | None]:
        """Keys, values and indices of all finished chunks, those of the state first; and the document of each, [B, n] or None."""
        count = int(closed.sum(1).max())  # rows that finish fewer are filled up with dead ones
        order = closed.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
        pick = order[..., None, None].expand(-1, -1, *c.shape[2:])
        new = c.gather(1, pick), u.gather(1, pick), torch.where(closed, index, DEAD).gather(1, order)
        document = None if doc is None else doc.gather(1, order)
        if state is None:
            return Growing(new[0]), Growing(new[1]), Growing(new[2]), document
        if document is not None:
            document = F.pad(document, (state.chunks.length, 0))
        if count == 0:
            return state.keys, state.values, state.chunks, document
        return state.keys.append(new[0]), state.values.append(new[1]), state.chunks.append(new[2]), document

    @staticmethod
    def _visible(index: Tensor, chunks: Tensor, doc: Tensor | None, key_doc: Tensor | None) -> Tensor:
        """Which finished chunk each token may see, [B, T, n]: alive, of its document, and before its own chunk."""
        seen = (chunks >= 0)[:, None] & (chunks[:, None] < index[..., None])
        return seen if doc is None or key_doc is None else seen & (doc[..., None] == key_doc[:, None])

    def _attend(self, q: Tensor, c: Tensor, u: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention over the finished chunks and the token's own average, [B, T, H, D / H]."""
        q = q * self.head_dim**-0.5
        score = torch.einsum("bthd,bnhd->bhtn", q, keys).masked_fill(~mask[:, None], -torch.inf)
        own = (q * c).sum(-1).transpose(1, 2)[..., None]
        weight = torch.cat([score, own], -1).to(accumulate_dtype(q)).softmax(-1).to(u.dtype)
        return torch.einsum("bhtn,bnhd->bthd", weight[..., :-1], values) + weight[..., -1:].transpose(1, 2) * u

    @staticmethod
    def _let_go(keys: Growing, values: Growing, chunks: Growing, current: Tensor) -> tuple[Growing, Growing, Growing]:
        """Only the live keys of each row's last document, moved to the left, as wide as the longest row's."""
        alive = (chunks.tensor >= 0) & current
        order = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(alive.sum(1).max()) if alive.shape[1] else 0]
        pick = order[..., None, None].expand(-1, -1, *keys.tensor.shape[2:])
        index = torch.where(alive, chunks.tensor, DEAD).gather(1, order)
        return Growing(keys.tensor.gather(1, pick)), Growing(values.tensor.gather(1, pick)), Growing(index)
