"""Mamba-ND: pictures and films by a one-dimensional mixer whose layers take turns in the direction they scan (arXiv 2402.05892)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...catalog import find, system
from ...errors import ShapeError, UsageError, divides, positive
from ...mixers.parts import RMSNorm

AXES = {2: "HW", 3: "THW"}
TURNS = {2: ("H+", "H-", "W+", "W-"), 3: ("H+", "H-", "W+", "W-", "T+", "T-")}
"""The directions of successive layers, over and over: those of the paper's best order, one a layer."""


def scan_order(grid: Sequence[int], direction: str) -> Tensor:
    """Where the tokens of a row-major grid stand in a scan: the scan's i-th token is token order[i], int64 [T].

    direction: the axis that moves slowest, the others following in their own order, and '+' or '-' (the whole backwards). On pictures "H+"
    is row by row and "W+" column by column. Raises UsageError on a direction that the grid does not have.
    """
    axes = AXES[len(grid)]
    if len(direction) != 2 or direction[0] not in axes or direction[1] not in "+-":
        raise UsageError(f"direction is {direction!r}; on a grid of {len(grid)} axes it may be {', '.join(TURNS[len(grid)])}.")
    index = torch.arange(torch.Size(grid).numel()).reshape(tuple(grid))
    order = index.movedim(axes.index(direction[0]), 0).flatten()
    return order if direction[1] == "+" else order.flip(0)


class MambaNDBlock(nn.Module):
    """h <- h + undo(mixer(order(norm(h)))) for h [B, T, dim]."""

    order: Tensor
    undo: Tensor

    def __init__(self, dim: int, mixer: str, hyper: Mapping[str, Any], order: Tensor):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.mixer = find(mixer, ("mixer",)).builder(dim=dim, **hyper)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("undo", order.argsort(), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        y, _ = self.mixer(self.norm(h)[:, self.order])
        return h + y[:, self.undo]


@system(
    "mamba-nd",
    kind="vision",
    paper="arXiv:2402.05892",
    year=2024,
    name="Mamba-ND",
    example={"size": (8, 8), "patch": 2, "dim": 32, "depth": 4, "num_classes": 3},
    parity="permuting the input permutes the outputs of the 1D mixer",
    claim="CIFAR-10: alternating directions above a single one at equal parameters.",
)
class MambaND(nn.Module):
    """x [B, channels, H, W], or [B, channels, T, H, W] for films -> logits [B, num_classes].

        h = patches(x) + positions;   h <- h + undo_l(mixer_l(order_l(norm(h)))) for every layer l;   logits = W mean(norm(h)) + b

    An unchanged 1D mixer in every layer, each scanning the patches in one direction: H+, H-, W+, W- by turns, and T+, T- in films.
    size: (H, W) or (T, H, W); patch: the side of a patch, or one number an axis. mixer: a slug of the catalog, and hyper its
    hyper-parameters; directions: another list of turns than the paper's. The residual is the one before the norm (the released block that
    is not fused adds the normed one). Raises UsageError on sizes that do not fit and ShapeError on a wrong input.
    """

    def __init__(
        self,
        size: Sequence[int] = (32, 32),
        patch: int | Sequence[int] = 4,
        channels: int = 3,
        num_classes: int = 10,
        dim: int = 128,
        depth: int = 8,
        mixer: str = "mamba",
        hyper: Mapping[str, Any] | None = None,
        directions: Sequence[str] | None = None,
    ):
        super().__init__()
        if len(size) not in AXES:
            raise UsageError(f"size is {list(size)}; it must be [H, W] or [T, H, W].")
        sides = [patch] * len(size) if isinstance(patch, int) else list(patch)
        if len(sides) != len(size):
            raise UsageError(f"patch is {sides}; it must be one number, or one for each of the {len(size)} axes of size.")
        for axis, side, total in zip(AXES[len(size)], sides, size):
            positive(**{f"patch along {axis}": side, f"size along {axis}": total})
            divides(f"patch along {axis}", side, f"size along {axis}", total)
        positive(channels=channels, num_classes=num_classes, dim=dim, depth=depth)
        self.shape = (channels, *size)
        self.grid = [total // side for side, total in zip(sides, size)]
        conv = nn.Conv2d if len(size) == 2 else nn.Conv3d
        self.embed = conv(channels, dim, tuple(sides), stride=tuple(sides))  # type: ignore[arg-type]
        self.positions = nn.Parameter(0.02 * torch.randn(torch.Size(self.grid).numel(), dim))
        turns = directions or TURNS[len(size)]
        self.directions = [turns[layer % len(turns)] for layer in range(depth)]
        self.blocks = nn.ModuleList(MambaNDBlock(dim, mixer, hyper or {}, scan_order(self.grid, turn)) for turn in self.directions)
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ShapeError(f"x has shape {list(x.shape)}; this model expects [B, {', '.join(map(str, self.shape))}].")
        h = self.embed(x).flatten(2).mT + self.positions  # [B, patches, dim]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))
