"""LongVQ: MEGA's block over an S4D, whose attention reads the far past through a codebook of keys (arXiv 2404.11163; our reading)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..ops.scan import scan
from ..span import Span, positions
from ..state import State
from .mega import Chunks, GatedChunkAttention, relative
from .s4d import DiagonalSSM


class LongVQState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    moved: Tensor  # [B, D, N / 2, 2] float32, the state space's modes
    keys: Tensor  # [B, c, Z] of the open chunk, zero where no token is yet
    values: Tensor  # [B, c, E]
    sums: Tensor  # [B, S, E + 1] float32: values of closed chunks summed by code, and how many


@system(
    "longvq", kind="mixer", paper="arXiv:2404.11163", year=2024, name="LongVQ",
    example={"chunk": 8, "order": 4, "codes": 6, "value_dim": 8}, state="D N + c (Z + E) + S (E + 1)",
    parity="where every key is its code: softmax attention over all of the past", claim="Long Range Arena average above MEGA-chunk",
)  # fmt: skip
class LongVQ(GatedChunkAttention):
    """x [B, T, dim] -> y [B, T, dim]; the state is O(S): a state space, the open chunk, and sums of values for each of S = `codes` codes.

        move(x) = SiLU(DiagonalSSM(x) + omega x)
        U_c, n_c: sum and number of the values in closed chunks whose key is nearest to code c
        o_t = (sum_{i in chunk} e^{q.k_i} v_i + sum_c e^{q.c} U_c) / (sum_{i in chunk} e^{q.k_i} + sum_c e^{q.c} n_c)

    within a document; q has the factor Z^-0.5. The rest is MEGA's block. Keys of the open chunk are exact; a closed chunk's are their
    codes, so gradients reach far values, and keys only while their chunk is open and by `commitment`. The codebook is a buffer that no
    call changes: training code calls `update_codebook`. A state's sums belong to the codebook that made them.
    """

    codebook: Tensor
    code_count: Tensor

    def __init__(
        self,
        dim: int,
        codes: int = 64,
        order: int = 16,
        key_dim: int | None = None,
        value_dim: int | None = None,
        chunk: int = 64,
        decay: float = 0.99,
        backend: str = "auto",
    ):
        super().__init__()
        if not 0 <= decay < 1:
            raise UsageError(f"decay is {decay}; the codebook's moving average needs a number in 0..1 (1 excluded).")
        self.decay = decay
        self.ssm = DiagonalSSM(dim, order, "lin", 1e-3, 1e-1, backend)
        self.omega = nn.Parameter(torch.randn(dim))
        self.build(dim, key_dim, value_dim, chunk, "softmax")
        self.register_buffer("codebook", torch.randn(codes, self.sizes[1]) * 0.02)
        self.register_buffer("code_count", torch.ones(codes))

    def move(self, x: Tensor, moved: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        o, last = self.ssm(x, moved, span)
        return F.silu(o + self.omega * x), last

    def codes(self, k: Tensor) -> Tensor:
        """Index of the code nearest to each key, [...]; k [..., Z]."""
        return (self.codebook.square().sum(-1) - 2 * k.detach() @ self.codebook.mT).argmin(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, carried: tuple[Tensor, ...] | None, chunks: Chunks) -> tuple[Tensor, tuple]:
        size, number = self.chunk, len(self.codebook)
        dtype = accumulate_dtype(v)
        if carried is None:
            sums = v.new_zeros(len(v), number, v.shape[-1] + 1, dtype=dtype)
            carried = k.new_zeros(len(k), size, k.shape[-1]), v.new_zeros(len(v), size, v.shape[-1]), sums
        keys, values = chunks.lay(k, carried[0]), chunks.lay(v, carried[1])  # [B, n, c, Z], [B, n, c, E]
        # what chunk j - 1 adds when chunk j opens; a chunk that opens after another of its document is full, so all its places count
        hot = F.one_hot(self.codes(keys[:, :-1]), number).to(dtype)  # [B, n - 1, c, S]
        added = hot.mT @ F.pad(values[:, :-1].to(dtype), (0, 1), value=1.0)  # [B, n - 1, S, E + 1]
        added = added.masked_fill(chunks.fresh[:, 1:, None, None], 0).flatten(2)
        later, _ = scan(torch.zeros_like(added), added, carried[2].flatten(1), Span(reset=chunks.fresh[:, 1:]), "torch")
        sums = torch.cat([carried[2][:, None], later.unflatten(2, carried[2].shape[1:])], 1)  # [B, n, S, E + 1]
        held = chunks.last(keys), chunks.last(values), chunks.last(sums)
        at = torch.arange(size, device=q.device)
        if q.shape[1] == 1:
            return self._read(q, *held, chunks.place), held
        queries = chunks.lay(q, torch.zeros_like(carried[0]))
        return chunks.collect(self._read(queries, keys, values, sums, at)), held

    def _read(self, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, place: Tensor) -> Tensor:
        """One softmax over the open chunk's keys and the codes, a code weighing as much as the keys it stands for."""
        bias, seen = relative(self.bias, place)
        near = (q @ k.mT + bias).masked_fill(~seen, -torch.inf).to(sums.dtype)
        number = sums[..., -1].detach()
        mean = sums[..., :-1] / number.clamp(min=1)[..., None]
        far = (q @ self.codebook.mT).to(sums.dtype) + number.log()[..., None, :]  # log 0: a code that nothing was assigned to
        weight = torch.cat([near, far], -1).softmax(-1)
        return (weight[..., : self.chunk] @ v.to(sums.dtype) + weight[..., self.chunk :] @ mean).to(v.dtype)

    def _keys(self, x: Tensor, state: LongVQState | None, span: Span | None) -> Tensor:
        """The real tokens' keys, [n, Z]; span right-padded."""
        m, _ = self.move(x, state and state.moved, span)
        z = self.to_gzrh(m).split(self.sizes, -1)[1]
        k = F.silu(z) * self.kappa[1] + self.mu[1]
        return k.flatten(0, 1) if span is None or span.valid is None else k[span.valid]

    def commitment(self, x: Tensor, state: LongVQState | None = None, span: Span | None = None) -> Tensor:
        """mean |k - code(k)|^2 over the real tokens, the code held fixed; the paper's weight is of the order of 1e-4. span right-padded."""
        k = self._keys(x, state, span)
        return (k - self.codebook[self.codes(k)]).square().sum(-1).mean()

    @torch.no_grad()
    def update_codebook(self, x: Tensor, state: LongVQState | None = None, span: Span | None = None) -> None:
        """Move every code that was used towards the mean of its keys (exponential averages of count and sum); span right-padded."""
        k = self._keys(x, state, span).float()
        hot = F.one_hot(self.codes(k.to(self.codebook.dtype)), len(self.codebook)).float()  # [n, S]
        total = self.code_count.float()[:, None] * self.codebook.float()
        count = self.decay * self.code_count.float() + (1 - self.decay) * hot.sum(0)
        total = self.decay * total + (1 - self.decay) * hot.mT @ k
        self.codebook.copy_(torch.where(count[:, None] > 1e-6, total / count.clamp(min=1e-6)[:, None], self.codebook.float()))
        self.code_count.copy_(count)

    def forward(self, x: Tensor, state: LongVQState | None = None, span: Span | None = None) -> tuple[Tensor, LongVQState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        carried: Any = None if state is None else (state.keys, state.values, state.sums)
        y, moved, (keys, values, sums) = self.mix(x, state and state.moved, at, carried, span)
        return y, LongVQState(seen=at[:, -1] + 1, moved=moved, keys=keys, values=values, sums=sums)
