"""Encoder: a small bidirectional transformer for masked language modelling, with a recurrence beside the feed-forward if wanted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import find
from ..errors import ShapeError, UsageError, divides, positive
from ..mixers.base import Mixer
from ..mixers.parts import RMSNorm
from ..span import Span


class EncoderBlock(nn.Module):
    """h <- h + attention(norm(h)), both ways; h <- h + ffn(norm(h)) + recurrence(norm(h)), from the left.

    The hidden width of the feed-forward is `hidden`, less what the recurrence costs in parameters.
    """

    def __init__(self, dim: int, heads: int, hidden: int, recurrence: str | None, eps: float):
        super().__init__()
        self.heads = heads
        self.norm, self.ffn_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.to_qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.recurrence: Mixer | None = None
        if recurrence is not None:
            self.recurrence = find(recurrence, ("mixer",)).builder(dim=dim)
            spent = sum(weight.numel() for weight in self.recurrence.parameters())  # type: ignore[union-attr]
            hidden -= -(-spent // (2 * dim + 1))
            if hidden < 1:
                raise UsageError(f"{recurrence!r} has {spent} parameters, more than the feed-forward has to give; give a larger ffn.")
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, h: Tensor, valid: Tensor | None) -> Tensor:
        q, k, v = self.to_qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        mask = None if valid is None else valid[:, None, None, :]
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        u = self.ffn_norm(h)
        h = h + self.down(F.gelu(self.up(u)))
        if self.recurrence is not None:
            h = h + self.recurrence(u, None, None if valid is None else Span(valid))[0]
        return h


class Encoder(nn.Module):
    """ids [B, T] -> logits [B, T, vocab]: learned positions, pre-norm blocks, every token sees every other. No state, so no streaming.

    recurrence: the slug of a mixer that stands beside every feed-forward, which is cut to keep the number of parameters ("simple-
    recurrence-mlm" is SwishRNN in BERT, arXiv 2205.11588); None is the plain baseline. ffn: hidden width as a multiple of dim.
    max_length: positions that there are. The head is the embedding transposed.
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        ffn: float = 4.0,
        max_length: int = 512,
        recurrence: str | None = "simple-recurrence-mlm",
        eps: float = 1e-5,
    ):
        super().__init__()
        positive(vocab=vocab, dim=dim, depth=depth, heads=heads, max_length=max_length)
        divides("heads", heads, "dim", dim)
        self.vocab, self.max_length = vocab, max_length
        self.embedding, self.positions = nn.Embedding(vocab, dim), nn.Embedding(max_length, dim)
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads, int(dim * ffn), recurrence, eps) for _ in range(depth))
        self.norm = RMSNorm(dim, eps)
        self.bias = nn.Parameter(torch.zeros(vocab))
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """ids [B, T] int64, T <= max_length; valid [B, T] bool, False at padding, which no token sees. Raises ShapeError otherwise."""
        if ids.ndim != 2 or ids.numel() == 0 or ids.shape[1] > self.max_length:
            raise ShapeError(f"ids have shape {list(ids.shape)}; this encoder expects [B, T] with 1 <= T <= {self.max_length}.")
        if valid is not None:
            if valid.shape != ids.shape or valid.dtype != torch.bool:
                raise ShapeError(f"valid is {valid.dtype} with shape {list(valid.shape)}; it must be bool {list(ids.shape)}.")
            at = (valid.cumsum(1) - 1).clamp(min=0)
            valid = valid | ~valid.any(1, keepdim=True)  # a row of padding alone sees itself: a softmax over nothing is NaN
        else:
            at = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        h = self.embedding(ids) + self.positions(at)
        for block in self.blocks:
            h = block(h, valid)
        return F.linear(self.norm(h), self.embedding.weight, self.bias)


def mask_tokens(
    ids: Tensor, mask_id: int, vocab: int, valid: Tensor | None = None, rate: float = 0.15, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """BERT's corruption (arXiv 1810.04805): -> (inputs, targets) [B, T]; targets are -100 where nothing is asked.

    Of the `rate` of real tokens that are asked, 80% become `mask_id`, 10% a random id, 10% stay.
    """
    if not 0 < rate <= 1:
        raise UsageError(f"rate is {rate}; it must be in (0, 1].")
    draw = torch.rand(ids.shape, generator=generator, device=ids.device)
    asked = draw < rate if valid is None else (draw < rate) & valid
    random = torch.randint(vocab, ids.shape, generator=generator, device=ids.device)
    part = draw / rate  # uniform in [0, 1) where asked
    inputs = torch.where(part < 0.8, mask_id, torch.where(part < 0.9, random, ids))
    return torch.where(asked, inputs, ids), ids.masked_fill(~asked, -100)


def masked_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy over the asked tokens (targets other than -100); 0 where none is asked."""
    wanted = targets != -100
    return F.cross_entropy(logits[wanted].float(), targets[wanted], reduction="sum") / wanted.sum().clamp(min=1)
