"""Compressive Transformer: attention over a memory of past inputs and a second one of older inputs, compressed (arXiv 1911.05507)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, divides
from ..state import State
from .relative_attention import RelativeAttention, sinusoids
from .segmented import Part, SegmentMixer, newest

COMPRESSIONS = ("conv", "mean", "max")


class CompressiveState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    inputs: Tensor  # [B, M + S, dim]: the memory, the newest last, then the open segment; 0 where no token is
    keys: Tensor  # [B, N + M + S, H, D]: the compressed memory, the memory, the open segment
    values: Tensor  # [B, N + M + S, H, D]


@system(
    "compressive-transformer",
    kind="segment-memory",
    paper="arXiv:1911.05507",
    year=2019,
    name="Compressive Transformer",
    example={"heads": 2, "segment": 8, "memory": 8, "compressed": 4, "ratio": 4},
    state="(M + S) dim + 2 (N + M + S) dim, M = memory, N = compressed",
    parity="the equations in a loop; with ratio 1 a Transformer-XL of memory M + N",
    claim="At equal attention cost its loss on long documents is below that of a Transformer-XL; the reconstruction loss falls.",
)
class CompressiveTransformer(SegmentMixer, RelativeAttention):
    """x [B, T, dim] -> y [B, T, dim]; relative attention over [compressed memory | memory | segment], N + M + S keys.

        s_ij = ((q_i + u) . k_j + (q_i + v) . W_r R_{i-j}) / sqrt(D)        i, j: places in the concatenation
        at the segment's end    memory <- the newest M of [memory | segment]; the S inputs that it loses become S / c vectors
                                compressed <- the newest N of [compressed | sg(f(lost))]

    f: "conv" (kernel and stride c), "mean" or "max" over c inputs; the paper's dilated and most-used compressions are left out. c = ratio,
    a divisor of S and M, so that no vector is made of fewer than c inputs. No gradient of y reaches f: it learns by
    `reconstruction_loss`. The paper stops gradients at the memory too; here `state.detach()` does. heads: H. dim must be even.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        segment: int = 128,
        memory: int = 128,
        compressed: int = 64,
        ratio: int = 4,
        compression: str = "conv",
    ):
        super().__init__(dim, heads)
        divides("ratio", ratio, "segment", segment)
        divides("ratio", ratio, "memory", memory)
        if compression not in COMPRESSIONS:
            raise UsageError(f"compression is {compression!r}; it may be {', '.join(COMPRESSIONS)}.")
        self.segment, self.memory, self.compressed, self.ratio, self.compression = segment, memory, compressed, ratio, compression
        self.conv = nn.Conv1d(dim, dim, ratio, ratio) if compression == "conv" else None

    def compress(self, x: Tensor) -> Tensor:
        """f: [B, n c, dim] -> [B, n, dim]."""
        if self.conv is not None:
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        blocks = x.unflatten(1, (-1, self.ratio))
        return blocks.mean(2) if self.compression == "mean" else blocks.amax(2)

    def fresh(self, x: Tensor) -> CompressiveState:
        batch, dim = len(x), x.shape[2]
        inputs = x.new_zeros(batch, self.memory + self.segment, dim)
        keys = x.new_zeros(batch, self.compressed + inputs.shape[1], self.heads, self.head_dim)
        return CompressiveState(seen=torch.zeros(batch, dtype=torch.long, device=x.device), inputs=inputs, keys=keys, values=keys)

    def project(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        return x, *(part.unflatten(-1, (self.heads, -1)) for part in self.to_qkv(x).chunk(3, -1))

    def advance(self, parts: tuple[Tensor, ...], state: CompressiveState, part: Part) -> tuple[Tensor, CompressiveState]:
        x, q, k, v = parts
        M, N = self.memory, self.compressed
        inputs = torch.cat([state.inputs[:, :M], part.place(state.inputs[:, M:], x)], 1)
        keys, values = (
            torch.cat([old[:, : N + M], part.place(old[:, N + M :], new)], 1) for old, new in ((state.keys, k), (state.values, v))
        )
        there = torch.cat([newest(keys[:, :N], (part.before - M) // self.ratio), newest(keys[:, N : N + M], part.before)], 1)
        mask = part.mask(there)
        size = keys.shape[1] if part.valid is not None else N + M + int(part.slots(x.device)[0, -1]) + 1
        place = N + M + part.slots(x.device)
        distance = (place[..., None] - torch.arange(size, device=x.device)).expand(len(x), -1, -1)
        table = sinusoids(keys.shape[1], x.shape[2], x.device, x.dtype)
        o = self._attend(q, keys[:, :size], values[:, :size], mask[:, :, :size], distance, table)
        if part.any_ends:
            inputs, keys, values = self._shift(inputs, keys, values, part)
        return o, state.replace(inputs=inputs, keys=keys, values=values)

    def _shift(self, inputs: Tensor, keys: Tensor, values: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """What the next segment starts from, in the rows whose segment ends."""
        S, N = self.segment, self.compressed
        short = self.compress(inputs[:, :S].detach()).detach()
        _, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.to_qkv(short).chunk(3, -1))
        moved = torch.cat([inputs[:, S:], torch.zeros_like(inputs[:, :S])], 1)

        def push(old: Tensor, new: Tensor) -> Tensor:
            first = torch.cat([old[:, :N], new.to(old.dtype)], 1)
            return torch.cat([first[:, new.shape[1] :], old[:, N + S :], torch.zeros_like(old[:, :S])], 1)

        return part.commit(moved, inputs), part.commit(push(keys, k), keys), part.commit(push(values, v), values)

    def reconstruction_loss(self, x: Tensor) -> Tensor:
        """Mean over tokens of sum_h |attn(x; lost) - attn(x; f(lost))|^2, the paper's attention reconstruction. Trains f alone.

        x [B, T, dim]: what the layer reads, rows of one document each from its start, T >= M + S. attn: softmax of content alone, of each
        segment's queries over the S inputs that the memory loses at its end. Nothing but f gets a gradient.
        """
        S, M = self.segment, self.memory
        first = -(-M // S)  # the first segment at whose end the memory loses S inputs
        count = x.shape[1] // S - first
        if count < 1:
            raise UsageError(f"x has {x.shape[1]} tokens; the memory of {M} first loses a segment of {S} after {(first + 1) * S}.")
        x, weight = x.detach(), self.to_qkv.weight.detach()
        lost = x[:, first * S - M :][:, : count * S].unflatten(1, (count, S)).flatten(0, 1)
        queries = x[:, first * S :][:, : count * S].unflatten(1, (count, S)).flatten(0, 1)
        w_q, w_k, w_v = weight.chunk(3)

        def heads(y: Tensor, w: Tensor) -> Tensor:
            return F.linear(y, w).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q = heads(queries, w_q)
        short = self.compress(lost)
        full, approximate = (F.scaled_dot_product_attention(q, heads(y, w_k), heads(y, w_v)) for y in (lost, short))
        return (full - approximate).square().sum((1, 3)).mean()
