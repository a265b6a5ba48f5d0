"""EncoderDecoder: a source that is read whole, and a recurrent decoder that looks at it by cross-attention (arXiv 2407.05489)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ShapeError, divides, positive
from ..mixers.parts import GatedFFN, RMSNorm
from ..span import Span, advance
from ..state import State
from .decoder import Block
from .encoder import EncoderBlock


class EncoderDecoderState(State):
    seen: Tensor  # [B] int64, target tokens read
    layers: tuple  # the decoder mixers' states, bottom up
    keys: tuple  # of the source, one [B, H, S, D] a layer
    values: tuple  # [B, H, S, D]
    valid: Tensor  # [B, S] bool, False at the source's padding


class CrossBlock(nn.Module):
    """h <- h + mixer(norm(h)); h <- h + attention(norm(h), source); h <- h + ffn(norm(h)); no positions in the attention."""

    def __init__(self, dim: int, mixer: str, heads: int, ffn: float, eps: float, layer: int, layers: int):
        super().__init__()
        self.heads = heads
        self.block = Block(dim, {"mixer": mixer}, 0, eps, layer, layers)
        self.cross_norm, self.ffn_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.to_q, self.to_kv, self.out = (nn.Linear(dim, width * dim, bias=False) for width in (1, 2, 1))
        self.ffn = GatedFFN(dim, int(ffn * dim))

    def source(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """encoded [B, S, dim] -> keys, values [B, H, S, D]."""
        keys, values = self.to_kv(encoded).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(
        self, h: Tensor, state: State | None, span: Span | None, keys: Tensor, values: Tensor, valid: Tensor
    ) -> tuple[Tensor, State]:
        h, new = self.block(h, state, span)
        q = self.to_q(self.cross_norm(h)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D]
        seen = F.scaled_dot_product_attention(q, keys, values, valid[:, None, None])
        h = h + self.out(seen.transpose(1, 2).flatten(2))
        return h + self.ffn(self.ffn_norm(h)), new


class EncoderDecoder(nn.Module):
    """source [B, S], target [B, T] -> logits [B, T, vocab]: what comes after each target token. Defaults are the public code's (ssm-mt).

    encoder: the slug of a mixer, read from the left (Mamba enc-dec: "mamba", 8 blocks without feed-forward), or "transformer": blocks of
    attention both ways without positions, feed-forward `ffn` (the hybrid: 6 blocks). decoder: the slug of the mixer in each of the
    `decoder_layers` triples of mixer, cross-attention and feed-forward. Two embeddings; the head is the target's, transposed.
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 512,
        encoder: str = "mamba",
        decoder: str = "mamba",
        encoder_layers: int = 8,
        decoder_layers: int = 6,
        heads: int = 8,
        ffn: float = 4.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        positive(vocab=vocab, dim=dim, encoder_layers=encoder_layers, decoder_layers=decoder_layers, heads=heads)
        divides("heads", heads, "dim", dim)
        self.vocab = vocab
        self.source_embedding, self.embedding = nn.Embedding(vocab, dim), nn.Embedding(vocab, dim)
        self.encoder = nn.ModuleList(
            EncoderBlock(dim, heads, int(ffn * dim), None, eps)
            if encoder == "transformer"
            else Block(dim, {"mixer": encoder}, 0, eps, layer, encoder_layers)
            for layer in range(1, encoder_layers + 1)
        )
        self.decoder = nn.ModuleList(
            CrossBlock(dim, decoder, heads, ffn, eps, layer, decoder_layers) for layer in range(1, decoder_layers + 1)
        )
        self.source_norm, self.norm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        for table in (self.source_embedding, self.embedding):
            nn.init.normal_(table.weight, std=0.02)

    def _check(self, name: str, ids: Tensor, valid: Tensor | None) -> None:
        if ids.ndim != 2 or ids.dtype != torch.int64 or ids.numel() == 0:
            raise ShapeError(f"{name} has dtype {ids.dtype} and shape {list(ids.shape)}; it must be int64 [B, T], not empty.")
        if valid is not None and (valid.shape != ids.shape or valid.dtype != torch.bool):
            raise ShapeError(f"the mask of {name} is {valid.dtype} {list(valid.shape)}; it must be bool {list(ids.shape)}.")

    def read(self, source: Tensor, valid: Tensor | None = None) -> EncoderDecoderState:
        """The state from which a translation of source [B, S] starts; valid [B, S] bool is False at padding, on either side."""
        self._check("source", source, valid)
        h, span = self.source_embedding(source), None if valid is None else Span(valid)
        for block in self.encoder:
            h = block(h, valid if valid is None else _some(valid)) if isinstance(block, EncoderBlock) else block(h, None, span)[0]
        pairs = [block.source(self.source_norm(h)) for block in self.decoder]  # type: ignore[operator]
        there = torch.ones_like(source, dtype=torch.bool) if valid is None else _some(valid)
        seen = torch.zeros(len(source), dtype=torch.long, device=source.device)
        return EncoderDecoderState(
            seen=seen, layers=(None,) * len(pairs), keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs), valid=there
        )

    def step(self, target: Tensor, state: EncoderDecoderState, valid: Tensor | None = None) -> tuple[Tensor, EncoderDecoderState]:
        """The next target tokens [B, T] -> logits [B, T, vocab] and the state after them."""
        self._check("target", target, valid)
        if len(target) != len(state.seen):
            raise ShapeError(f"target has {len(target)} rows and the source {len(state.seen)}; they must agree.")
        h, span, layers = self.embedding(target), None if valid is None else Span(valid), []
        for block, old, keys, values in zip(self.decoder, state.layers, state.keys, state.values):
            h, new = block(h, old, span, keys, values, state.valid)
            layers.append(new)
        logits = F.linear(self.norm(h), self.embedding.weight)
        return logits, state.replace(seen=advance(state.seen, target.shape[1], span), layers=tuple(layers))

    def forward(
        self, source: Tensor, target: Tensor, source_valid: Tensor | None = None, target_valid: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, vocab] at each position of target [B, T], which starts with BOS; masks are False at padding."""
        return self.step(target, self.read(source, source_valid), target_valid)[0]


def _some(valid: Tensor) -> Tensor:
    """A row of padding alone sees itself: a softmax over nothing is NaN."""
    return valid | ~valid.any(1, keepdim=True)
