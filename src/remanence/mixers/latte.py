"""Latte: attention to a few latents, each of which is a running softmax average of the values (arXiv 2402.17512)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import divides
from ..ops.backend import accumulate_dtype
from ..ops.expsum import latents as mix
from ..span import Span, advance
from ..state import State
from .base import Mixer


class LatteState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    largest: Tensor  # [B, H, L] float32, the largest k of every latent
    total: Tensor  # [B, H, L] float32, the sum of exp(k - largest)
    weighted: Tensor  # [B, H, L, D] float32, the sum of exp(k - largest) v


@system(
    "latte",
    kind="mixer",
    paper="arXiv:2402.17512",
    year=2024,
    name="Latte (causal latent attention)",
    example={"latents": 5},
    state="H L (D / H + 2)",
    parity="the O(T^2) formula in torch; the authors' StableScanLatte (JAX), re-derived; one latent against a prefix softmax average",
    claim="On par with linear attention variants on Long Range Arena, perplexity near attention's on character-level text.",
)
class Latte(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is L averages of D = dim // heads numbers for each of H heads, whatever the length.

        o_t = sum_l softmax(q_t)[l] (sum_{s<=t} e^{k_s[l]} v_s) / (sum_{s<=t} e^{k_s[l]})        q, k, v = W x        y = W_o o

    heads: H. latents: L, for each head (the authors' code counts them over all heads). q and k are the L logits of a head, unscaled as in
    its stable form. The sliding-window softmax that the paper's second version mixes in as one more latent is not here.
    """

    def __init__(self, dim: int, heads: int = 4, latents: int = 16, backend: str = "auto"):
        super().__init__()
        divides("heads", heads, "dim", dim)
        self.heads, self.latents, self.backend = heads, latents, backend
        self.sizes = [heads * latents, heads * latents, dim]
        self.to_qkv = nn.Linear(dim, sum(self.sizes), bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: LatteState | None = None, span: Span | None = None) -> tuple[Tensor, LatteState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.to_qkv(x).split(self.sizes, -1))  # [B, T, H, L or D]
        q = q.to(accumulate_dtype(q)).softmax(-1)
        initial = (state.largest, state.total, state.weighted) if state else None
        o, (m, total, weighted) = mix(q, k, v, initial, span, self.backend)
        seen = advance(seen, x.shape[1], span)
        return self.out(o.flatten(2)), LatteState(seen=seen, largest=m, total=total, weighted=weighted)
