"""MEGA: a damped moving average under gated single-head attention within chunks (arXiv 2209.10655), and what TCNCA and LongVQ share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..ops.lti import diagonal
from ..span import Span, positions
from ..state import State
from .base import Mixer
from .parts import no_decay

ATTENTIONS = ("softmax", "laplace", "relu2")


class MegaState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    moved: Tensor  # [B, D, N] float32, the moving averages
    keys: Tensor  # [B, c, Z] of the open chunk, zero where no token is yet
    values: Tensor  # [B, c, E]


class Chunks(NamedTuple):
    """Where the tokens of a call lie when every document is cut into chunks of `size` from its own start.

    Chunk 0 is the one that the state given holds; it may get no token of this call.
    """

    size: int
    number: int
    slot: Tensor  # [B, T] place in the flattened chunks; number * size for padding
    place: Tensor  # [B, T] place in its chunk
    end: Tensor  # [B] the row's last chunk
    fresh: Tensor  # [B, number] bool: a document starts with this chunk

    @classmethod
    def of(cls, at: Tensor, size: int, span: Span | None) -> Chunks:
        """From the tokens' positions in their documents, [B, T]."""
        batch, length = at.shape
        place = at % size
        opens = place == 0
        if span is not None and span.valid is not None:
            opens = opens & span.valid
        which = opens.cumsum(1)
        end = which[:, -1]
        number = (length - 1) // size + 2 if span is None or span.reset is None else max(int(end.max()) + 1, 2)
        slot = which * size + place
        if span is not None and span.valid is not None:
            slot = torch.where(span.valid, slot, number * size)
        begins = torch.where(opens & (at == 0), which, number)
        fresh = torch.zeros(batch, number + 1, dtype=torch.bool, device=at.device).scatter(1, begins, True)[:, :-1]
        return cls(size, number, slot, place, end, fresh)

    def lay(self, x: Tensor, carried: Tensor) -> Tensor:
        """x [B, T, C] in its chunks, after what chunk 0 holds already: [B, number, size, C]."""
        room = x.new_zeros(len(x), (self.number - 1) * self.size + 1, x.shape[-1])
        index = self.slot[..., None].expand_as(x)
        return torch.cat([carried.to(x.dtype), room], 1).scatter(1, index, x)[:, :-1].unflatten(1, (self.number, self.size))

    def collect(self, y: Tensor) -> Tensor:
        """y [B, number, size, C] back in the order of the tokens, [B, T, C]."""
        index = self.slot.clamp(max=self.number * self.size - 1)[..., None].expand(-1, -1, y.shape[-1])
        return y.flatten(1, 2).gather(1, index)

    def last(self, y: Tensor) -> Tensor:
        """The row's last chunk of y [B, number, ...], [B, ...]."""
        return y[torch.arange(len(y), device=y.device), self.end]


def relative(bias: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """bias[i - j] and j <= i for queries at places i, [..., Q] -> [..., Q, size] each."""
    gap = place[..., None] - torch.arange(len(bias), device=bias.device)
    return bias[gap.clamp(min=0)], gap >= 0


def weigh(score: Tensor, bias: Tensor, seen: Tensor, attention: str) -> Tensor:
    """Attention weights from q . k: "softmax" scaled by Z^-0.5 before it gets here, the others divided by the number of keys seen."""
    if attention == "softmax":
        return (score + bias).masked_fill(~seen, -torch.inf).softmax(-1)
    score = score / seen.sum(-1, keepdim=True) + bias
    weight = F.relu(score).square() if attention == "relu2" else 0.5 * (1 + torch.erf((score - 0.5**0.5) / (0.282095 * 2**0.5)))
    return weight * seen.to(score.dtype)


class GatedChunkAttention(Mixer):
    """The block of MEGA around a `move` that mixes along time, feature by feature:

        m = move(x)        [g, z, r, h] = W m        g = sigmoid(g), z, r = SiLU(z), SiLU(r)        v = SiLU(W_v x)
        q, k = kappa_q * z + mu_q, kappa_k * z + mu_k        o = attention(q, k, v) within the token's chunk of its document, causal
        y = g * (SiLU(h + W_h (r * o)) - x)

    so that x + y is the published block's output. Under a pre-norm of the stack x here is the normed one, where the paper's last line has
    the residual stream itself. key_dim: Z. value_dim: E. chunk: tokens of a chunk. attention: "softmax", "laplace" or "relu2".
    """

    def build(self, dim: int, key_dim: int | None, value_dim: int | None, chunk: int, attention: str) -> None:
        """Make the projections; for a subclass's __init__."""
        if attention not in ATTENTIONS:
            raise UsageError(f"attention is {attention!r}; it may be {', '.join(ATTENTIONS)}.")
        key_dim, value_dim = key_dim or max(dim // 4, 1), value_dim or 2 * dim
        self.chunk, self.attention = chunk, attention
        self.sizes = [dim, key_dim, value_dim, dim]  # g, z, r, h
        self.to_v, self.to_gzrh, self.to_h = nn.Linear(dim, value_dim), nn.Linear(dim, sum(self.sizes)), nn.Linear(value_dim, dim)
        for linear in (self.to_v, self.to_gzrh, self.to_h):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.kappa, self.mu = nn.Parameter(torch.randn(2, key_dim) * 0.02), nn.Parameter(torch.zeros(2, key_dim))
        self.bias = nn.Parameter(torch.randn(chunk) * 0.02)  # by distance

    def move(self, x: Tensor, moved: Any, span: Span | None) -> tuple[Tensor, Any]:
        """x [B, T, dim] mixed along time, and the new part of the state; moved is None at a fresh start."""
        raise NotImplementedError

    def mix(self, x: Tensor, moved: Any, at: Tensor, carried: tuple[Tensor, ...] | None, span: Span | None) -> tuple[Tensor, Any, tuple]:
        """(y, the new moved, the new carried), carried being what `attend` keeps: by default the open chunk's keys and values."""
        m, moved = self.move(x, moved, span)
        g, z, r, h = self.to_gzrh(m).split(self.sizes, -1)
        q, k = (F.silu(z)[:, :, None] * self.kappa + self.mu).unbind(2)
        if self.attention == "softmax":
            q = q * q.shape[-1] ** -0.5
        o, carried = self.attend(q, k, F.silu(self.to_v(x)), carried, Chunks.of(at, self.chunk, span))
        return g.sigmoid() * (F.silu(h + self.to_h(F.silu(r) * o)) - x), moved, carried

    def attend(self, q: Tensor, k: Tensor, v: Tensor, carried: tuple[Tensor, ...] | None, chunks: Chunks) -> tuple[Tensor, tuple]:
        """Causal attention within chunks: o [B, T, E], and the keys and values of the open chunk."""
        if carried is None:
            carried = k.new_zeros(len(k), self.chunk, k.shape[-1]), v.new_zeros(len(v), self.chunk, v.shape[-1])
        keys, values = chunks.lay(k, carried[0]), chunks.lay(v, carried[1])
        held = chunks.last(keys), chunks.last(values)
        if q.shape[1] == 1:  # one query needs one chunk only
            weight = weigh(q @ held[0].mT, *relative(self.bias, chunks.place), self.attention)
            return weight @ held[1], held
        queries = chunks.lay(q, torch.zeros_like(carried[0]))
        at = torch.arange(self.chunk, device=q.device)
        weight = weigh(queries @ keys.mT, *relative(self.bias, at), self.attention)
        return chunks.collect(weight @ values), held


@system(
    "mega", kind="mixer", paper="arXiv:2209.10655", year=2022, name="MEGA", example={"chunk": 8, "modes": 4},
    state="D N + c (Z + E)", parity="the published block in its step form, re-derived",
    claim="Long Range Arena: 88.2 on average, 85.7 with chunks",
)  # fmt: skip
class Mega(GatedChunkAttention):
    """x [B, T, dim] -> y [B, T, dim]; the state is N averages a feature and the open chunk's keys and values.

        move(x) = SiLU(sum_n gamma_n h_t[n] / sqrt(N) + omega x_t)        h_t[n] = (1 - a_n d_n) h_{t-1}[n] + a_n beta_n x_t

    with a, d = sigmoid(alpha), sigmoid(delta) for each of N = `modes` averages a feature: the multi-dimensional damped EMA, one
    direction. The rest, and the other hyper-parameters, as in GatedChunkAttention.
    """

    def __init__(
        self,
        dim: int,
        modes: int = 16,
        key_dim: int | None = None,
        value_dim: int | None = None,
        chunk: int = 128,
        attention: str = "softmax",
        backend: str = "auto",
    ):
        super().__init__()
        self.backend = backend
        self.alpha, self.delta = (no_decay(nn.Parameter(torch.randn(dim, modes) * 0.2)) for _ in range(2))
        sign = 1 - 2 * (torch.arange(modes) % 2)
        self.beta = nn.Parameter(sign + torch.randn(dim, modes) * 0.02)
        self.gamma, self.omega = nn.Parameter(torch.randn(dim, modes)), nn.Parameter(torch.randn(dim))
        self.build(dim, key_dim, value_dim, chunk, attention)

    def move(self, x: Tensor, moved: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        dtype = accumulate_dtype(x)
        a, d = self.alpha.to(dtype).sigmoid(), self.delta.to(dtype).sigmoid()
        log_decay = torch.log1p(-(a * d).clamp(max=1 - torch.finfo(dtype).eps))  # a d may round to 1, where the log has no gradient
        read = self.gamma.to(dtype) * self.gamma.shape[1] ** -0.5
        o, moved = diagonal(log_decay, a * self.beta.to(dtype), read, x, moved, span, self.backend)
        return F.silu(o + self.omega * x), moved

    def forward(self, x: Tensor, state: MegaState | None = None, span: Span | None = None) -> tuple[Tensor, MegaState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        carried = None if state is None else (state.keys, state.values)
        y, moved, (keys, values) = self.mix(x, state and state.moved, at, carried, span)
        return y, MegaState(seen=at[:, -1] + 1, moved=moved, keys=keys, values=values)
