"""A small vision transformer (arXiv 2010.11929): what the recurrent models of this folder are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import divides, positive
from .plstm_2d import patches


class Attention2D(nn.Module):
    """h [B, N, dim] -> softmax attention of all tokens over all, heads side by side."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.to_qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViTBlock(nn.Module):
    """h <- h + attention(norm(h)); h <- h + W_2 gelu(W_1 norm(h))."""

    def __init__(self, dim: int, heads: int, ffn: float):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), Attention2D(dim, heads)
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, int(dim * ffn)), nn.GELU(), nn.Linear(int(dim * ffn), dim))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.norm(h))
        return h + self.ffn(h)


def resized(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Learned positions [X, Y, dim] for another grid: stretched by bicubic interpolation, as is the custom."""
    if positions.shape[:2] == (rows, columns):
        return positions
    return F.interpolate(positions.permute(2, 0, 1)[None], (rows, columns), mode="bicubic")[0].permute(1, 2, 0)


class ViT(nn.Module):
    """x [B, channels, height, width] -> logits [B, num_classes]; pre-norm blocks of attention over patches, then their mean.

    size: the side of the pictures of training, whose learned positions are stretched over pictures of another size.
    """

    def __init__(
        self, size: int = 64, patch: int = 8, channels: int = 3, num_classes: int = 10, dim: int = 128, depth: int = 8, heads: int = 4,
        ffn: float = 4.0,
    ):  # fmt: skip
        super().__init__()
        positive(size=size, patch=patch, channels=channels, num_classes=num_classes, dim=dim, depth=depth, heads=heads)
        divides("heads", heads, "dim", dim)
        divides("patch", patch, "size", size)
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(size // patch, size // patch, dim))
        self.blocks = nn.Sequential(*(ViTBlock(dim, heads, ffn) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = patches(x, self.embed)
        h = h + resized(self.positions, h.shape[1], h.shape[2])
        return self.head(self.norm(self.blocks(h.flatten(1, 2))).mean(1))
