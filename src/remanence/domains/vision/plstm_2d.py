"""pLSTM-Vis: pictures by linear recurrences that run over the grid of patches from its four corners (arXiv 2506.11997)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...catalog import system
from ...errors import ShapeError, UsageError, divides, positive, unknown
from ...mixers.parts import RMSNorm
from ...ops.backend import accumulate_dtype
from ...ops.dag import FLIPS, FORMS, corners

GATES = {"P": 3, "D": 7}
"""Gates a corner and head: P source, transition, mark; D two sources, two transitions and their turn, two marks."""
POOLS = ("corners", "mean")


class PLSTM2D(nn.Module):
    """x [B, X, Y, dim] -> y like it; see `ops.dag` for the rule. With c a 3 x 3 depthwise convolution of x, and for every corner and head

        P   g = sigmoid(b + w . c / (2 dim)): sources (g S, (1 - g) S), what leaves to the right g T and down (1 - g) T, one mark M
        D   sources, transitions straight on and marks free, and one turn: into the edge down ("L") or into that to the right ("R")
        y = W_o RMSNorm(sum over corners of o + D (k . q) v) + s * x

    S, M, D = sigmoid(W c + gate_bias), T = sigmoid(W_T c + 1)^5. P sends a ray in the direction g, D diffuses; in both |T| <= 1 keeps all
    sums of paths bounded: in P what leaves a node is at most what came, in D one path joins two nodes. complement: 1 - g S and 1 - g T
    for the edges down, as the released code has it in place of the paper's (1 - g) S and (1 - g) T; its sources are then near 1.
    """

    def __init__(
        self, dim: int, heads: int = 4, mode: str = "P", chirality: str = "L", complement: bool = False, gate_bias: float = 0.0,
        form: str = "auto",
    ):  # fmt: skip
        super().__init__()
        for name, value, known in (("mode", mode, GATES), ("chirality", chirality, ("L", "R")), ("form", form, FORMS)):
            if value not in known:
                raise unknown(name, value, known)
        positive(dim=dim, heads=heads)
        divides("heads", heads, "dim", dim)
        self.heads, self.mode, self.chirality, self.complement, self.form = heads, mode, chirality, complement, form
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.to_qk = nn.Linear(dim, 2 * dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_direct = nn.Linear(dim, heads)
        self.to_gates = nn.Linear(dim, GATES[mode] * len(FLIPS) * heads)
        for gates in (self.to_direct, self.to_gates):
            nn.init.zeros_(gates.weight)
            nn.init.constant_(gates.bias, gate_bias)
        with torch.no_grad():  # the transitions come first
            self.to_gates.bias[: (1 if mode == "P" else 3) * len(FLIPS) * heads] = 1.0
        if mode == "P":
            self.angle = nn.Parameter(torch.linspace(-2, 2, heads).repeat(len(FLIPS), 1))
            self.to_angle = nn.Parameter(torch.zeros(len(FLIPS), heads, dim))
        self.norm = RMSNorm(dim // heads)
        self.passthrough = nn.Parameter(torch.ones(dim))
        self.out = nn.Linear(dim, dim, bias=False)

    def gates(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """source [B, X, Y, 4, H, 2], transition [B, X, Y, 4, H, 2, 2], mark [B, X, Y, 4, H, 2]."""
        raw = self.to_gates(c).to(accumulate_dtype(c)).unflatten(-1, (-1, len(FLIPS), self.heads)).movedim(-3, 0)
        crossing = 1 if self.mode == "P" else 3
        T, (*sources, M) = (5 * F.logsigmoid(raw[:crossing])).exp(), raw[crossing:].sigmoid().unbind(0)
        if self.mode == "D":
            source_right, source_down, mark_left = sources
            right, down, turn = T.unbind(0)
            none = torch.zeros_like(turn)
            into_right = torch.stack([right, turn if self.chirality == "R" else none], -1)  # [..., in]
            into_down = torch.stack([turn if self.chirality == "L" else none, down], -1)
            transition = torch.stack([into_right, into_down], -2)
            return torch.stack([source_right, source_down], -1), transition, torch.stack([mark_left, M], -1)
        S, T = sources[0], T[0]
        g = (self.angle + torch.einsum("fhd,...d->...fh", self.to_angle, c) * (0.5 / c.shape[-1])).sigmoid().to(T.dtype)
        source, out = (torch.stack([g * x, 1 - g * x if self.complement else (1 - g) * x], -1) for x in (S, T))
        return source, out[..., None].expand(*out.shape, 2), torch.stack([M, M], -1)

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k = self.to_qk(c).unflatten(-1, (2, self.heads, -1)).unbind(3)  # [B, X, Y, H, K]
        v = self.to_v(x).unflatten(-1, (self.heads, -1))
        q = q * q.shape[-1] ** -0.5
        direct = self.to_direct(c).to(accumulate_dtype(c)).sigmoid()
        o = corners(q, k, v, *self.gates(c), direct, self.form)  # [B, X, Y, H, V]
        return self.out(self.norm(o).flatten(3)) + self.passthrough * x


class PLSTMVisBlock(nn.Module):
    """h <- h + layer(norm(h)); h <- h + W_2 gelu(W_1 norm(h))."""

    def __init__(self, dim: int, layer: nn.Module, ffn: int):
        super().__init__()
        self.layer_norm, self.layer = RMSNorm(dim), layer
        self.ffn = nn.Sequential(RMSNorm(dim), nn.Linear(dim, ffn), nn.GELU(), nn.Linear(ffn, dim))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.layer(self.layer_norm(h))
        return h + self.ffn(h)


def patches(x: Tensor, embed: nn.Conv2d) -> Tensor:
    """x [B, channels, height, width] -> [B, X, Y, dim]. Raises ShapeError unless the patches tile the picture."""
    side = embed.kernel_size[0]
    if x.ndim != 4 or x.shape[1] != embed.in_channels or min(x.shape[2:]) < side or x.shape[2] % side or x.shape[3] % side:
        raise ShapeError(f"x has shape {list(x.shape)}; expected [B, {embed.in_channels}, height, width], both multiples of patch={side}.")
    return embed(x).permute(0, 2, 3, 1)


@system(
    "plstm-vis", kind="vision", paper="arXiv:2506.11997", year=2025, name="pLSTM-Vis",
    example={"patch": 4, "channels": 1, "num_classes": 2, "dim": 32, "depth": 2},
    state="none between pictures; within one a matrix K x V an edge and head", parity="the rule in a loop over the edges of the grid",
    claim="Arrow pointing: accuracy holds on larger pictures than those of training, where a ViT's drops", recipe="arrow-pointing",
)  # fmt: skip
class PLSTMVis(nn.Module):
    """x [B, channels, height, width], any size that `patch` divides -> logits [B, num_classes].

    Blocks with P and D layers by turns (depth of them in all) over the grid of patches, then a norm, then a linear map of the four
    corners' vectors (pool="corners", as released) or of the mean. Has no positions: the recurrences know where things are (the released
    model adds learned ones). chirality, complement, gate_bias, form: see PLSTM2D. ffn: hidden width as a multiple of dim. The released
    vision default leaves out the convolution and passthrough of its own layer, which are kept here. Raises ShapeError on a wrong input.
    """

    def __init__(
        self, patch: int = 8, channels: int = 3, num_classes: int = 10, dim: int = 128, depth: int = 8, heads: int = 4, ffn: float = 4.0,
        pool: str = "corners", chirality: str = "L", complement: bool = False, gate_bias: float = 0.0, form: str = "auto",
    ):  # fmt: skip
        super().__init__()
        positive(patch=patch, channels=channels, num_classes=num_classes, dim=dim, depth=depth)
        if pool not in POOLS:
            raise unknown("pool", pool, POOLS)
        if not dim * ffn >= 1:
            raise UsageError(f"ffn is {ffn}; dim={dim} times it must be at least 1.")
        self.pool = pool
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        layers = (PLSTM2D(dim, heads, "PD"[i % 2], chirality, complement, gate_bias, form) for i in range(depth))
        self.blocks = nn.Sequential(*(PLSTMVisBlock(dim, layer, int(dim * ffn)) for layer in layers))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim * (4 if pool == "corners" else 1), num_classes)
        nn.init.normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.blocks(patches(x, self.embed)))
        if self.pool == "mean":
            return self.head(h.mean((1, 2)))
        return self.head(torch.cat([h[:, x, y] for x in (0, -1) for y in (0, -1)], -1))
