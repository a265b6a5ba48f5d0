"""All-attention: attention whose softmax also covers learned key-value vectors, in the place of a feed-forward (arXiv 1907.01470)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from .relative_attention import RelativeAttention


@system(
    "persistent-memory",
    kind="mixer",
    paper="arXiv:1907.01470",
    year=2019,
    name="All-attention (persistent memory vectors)",
    aliases=("all-attention",),
    example={"heads": 2, "slots": 5},
    state="2 T dim, bounded by the window; the vectors are parameters",
    parity="the equation in a loop; with slots that no query fits, the attention without them",
    claim="With as many parameters, within 0.02 bits a character of attention and feed-forward.",
)
class PersistentMemory(RelativeAttention):
    """x [B, T, dim] -> y [B, T, dim]; one softmax over the tokens and N persistent pairs of each head, then W_o.

        logits = [ s_ij of the tokens (see RelativeAttention) | (q_i + u) . K_p / sqrt(D) ]        K_p = sqrt(D) k_p    V_p = sqrt(N) v_p

    k_p starts as N(0, 1 / D), v_p as N(0, 1 / N). Persistent pairs have no position. slots: N; 2 N dim numbers replace a feed-forward's,
    so a block of it takes `ffn=0`. Our reading: positions are Transformer-XL's (the paper learns a table of its own), `window` is its span,
    which it adapts.
    """

    def __init__(self, dim: int, heads: int = 4, window: int | None = None, slots: int = 1024):
        super().__init__(dim, heads, window)
        self.slots = slots
        self.slot_keys = nn.Parameter(torch.randn(heads, slots, self.head_dim) * self.head_dim**-0.5)
        self.slot_values = nn.Parameter(torch.randn(heads, slots, self.head_dim) * slots**-0.5)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, distance: Tensor, table: Tensor) -> Tensor:
        keys = (self.slot_keys * self.head_dim**0.5).to(k.dtype).transpose(0, 1).expand(len(k), -1, -1, -1)  # [B, N, H, D]
        values = (self.slot_values * self.slots**0.5).to(v.dtype).transpose(0, 1).expand(len(v), -1, -1, -1)
        # the slots' distance is a row of zeros behind the table: no position term
        return super()._attend(
            q,
            torch.cat([keys, k], 1),
            torch.cat([values, v], 1),
            F.pad(mask, (self.slots, 0), value=True),
            F.pad(distance, (self.slots, 0), value=len(table)),
            F.pad(table, (0, 0, 0, 1)),
        )
