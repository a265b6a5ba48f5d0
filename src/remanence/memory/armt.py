"""Associative Recurrent Memory Transformer: a fast-weight matrix in every layer, written from memory tokens (arXiv 2407.04841)."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError, positive
from ..models.base import Model
from ..models.decoder import Decoder, DecoderState
from ..ops.backend import accumulate_dtype
from ..state import State
from .base import Piece, Run, SegmentMemory
from .rmt import memory_prompt

EPS = 1e-5


class ARMTMemory(State):
    matrix: tuple  # of each layer, A [B, P, dim] float32
    norm: tuple  # of each layer, z [B, P] float32


def dpfp(a: Tensor, nu: int) -> Tensor:
    """phi(a) = concat_{j=1..nu} u * roll(u, j), u = [relu(a), relu(-a)] (arXiv 2102.11174): [..., D] -> [..., 2 nu D], never negative."""
    u = torch.cat([a.relu(), (-a).relu()], -1)
    return torch.cat([u * u.roll(j, -1) for j in range(1, nu + 1)], -1)


class Association(nn.Module):
    """One layer's memory: what reads from A [B, P, dim] and z [B, P] and what writes to them. Computes in float32 at least."""

    def __init__(self, dim: int, key_dim: int, nu: int, correction: bool):
        super().__init__()
        self.to_q = nn.Linear(dim, key_dim, bias=False)
        self.to_k = nn.Linear(dim, key_dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_beta = nn.Linear(dim, 1)
        nn.init.zeros_(self.to_v.weight)  # the memory does nothing at the start of training
        self.nu, self.correction = nu, correction

    def read(self, h: Tensor, A: Tensor, z: Tensor) -> Tensor:
        """h + phi(W_q h) A / (z . phi(W_q h) + 1e-5); h as it is while A is zero. h [B, T, dim]."""
        q = self.to_q(h)
        with torch.autocast(h.device.type, enabled=False):
            q = dpfp(q.to(A.dtype), self.nu)  # [B, T, P]
            return h + (q @ A / (q @ z[..., None] + EPS)).to(h.dtype)

    def write(self, h: Tensor, A: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The new A and z. All memory tokens h [B, m, dim] read the old ones.

            A + sum_i b_i k_i^T (v_i - k_i A / (z . k_i + 1e-5))
            z + sum_i g_i k_i                                    g_i = clip(1 - z . k_i / (|k_i|^2 + 1e-5), 0, 1)

        g, which keeps z from counting a key twice, passes no gradient.
        """
        k, v, b = self.to_k(h), self.to_v(h), self.to_beta(h)
        with torch.autocast(h.device.type, enabled=False):
            k, v, b = dpfp(k.to(A.dtype), self.nu), v.to(A.dtype), b.to(A.dtype).sigmoid()  # [B, m, P], [B, m, dim], [B, m, 1]
            known = k @ z[..., None]  # [B, m, 1]
            error = v - k @ A / (known + EPS)
            new = k
            if self.correction:
                new = k * (1 - known / (k.square().sum(-1, keepdim=True) + EPS)).clamp(0, 1).detach()
            return A + k.transpose(1, 2) @ (b * error), z + new.sum(1)


@system(
    "armt",
    kind="segment-memory",
    paper="arXiv:2407.04841",
    year=2024,
    name="Associative Recurrent Memory Transformer",
    example={"segment": 8, "tokens": 2, "key_dim": 16},
)
class ARMT(SegmentMemory):
    """ids [B, T] -> logits; the state is a matrix and a normaliser a layer between segments, and the backbone's state within one.

    Segment s is read as [x_s | P] with the same learned P [m, dim] each time. Layer l adds to its input, at every position, what its
    matrix A_l [2 nu key_dim, dim] holds (Association.read); its output at the m memory positions is written into A_l when the segment is
    complete (Association.write), for the next segment to read. A and z start at zero and are float32.
    backbone: a Decoder. segment: S. tokens: m in 0..S. key_dim, nu: of the keys, before and in DPFP. correction: the factor g of `write`,
    else 1.
    """

    kind = "armt"
    backbone: Decoder

    def __init__(self, backbone: Model, segment: int = 128, tokens: int = 8, key_dim: int = 64, nu: int = 3, correction: bool = True):
        super().__init__(backbone, segment, tokens=tokens, key_dim=key_dim, nu=nu, correction=correction)
        if not {"before", "after"} <= set(inspect.signature(backbone.encode).parameters):
            raise UsageError(f"backbone is a {type(backbone).__name__}; armt works between the layers of a Decoder.")
        positive(key_dim=key_dim, nu=nu)
        self.prompt = memory_prompt(backbone, tokens, segment)
        self.associations = nn.ModuleList(Association(backbone.dim, key_dim, nu, correction) for _ in self.backbone.blocks)
        self.associations.to(self.prompt)
        self.width = 2 * nu * key_dim

    def initial(self, h: Tensor) -> ARMTMemory:
        dtype = accumulate_dtype(h)
        layers = range(len(self.associations))
        matrix = tuple(h.new_zeros(len(h), self.width, self.dim, dtype=dtype) for _ in layers)
        return ARMTMemory(matrix=matrix, norm=tuple(h.new_zeros(len(h), self.width, dtype=dtype) for _ in layers))

    def advance(self, h: Tensor, memory: ARMTMemory, open: DecoderState | None, piece: Piece) -> tuple[Tensor, State, State | None]:
        run = Run(piece, h, back=self.prompt.to(h.dtype).expand(len(h), -1, -1), reset=open is not None)
        written = []

        def read(layer: int, x: Tensor) -> Tensor:
            return self.associations[layer].read(x, memory.matrix[layer], memory.norm[layer])  # type: ignore[operator]

        def write(layer: int, x: Tensor) -> Tensor:
            if piece.any_ends:
                tokens = run.split(x)[2]  # [B, m, dim]
                written.append(self.associations[layer].write(tokens, memory.matrix[layer], memory.norm[layer]))  # type: ignore[operator]
            return x

        hidden, open = self.backbone.encode(run.x, open, run.span, before=read, after=write)
        out = run.split(hidden)[1]
        if not written:
            return out, memory, open
        matrix, norm = zip(*written, strict=True)
        return out, piece.commit(ARMTMemory(matrix=matrix, norm=norm), memory), open
