"""ReMeDe: recurrent decision trees whose leaves hold an answer and an update of a memory (arXiv 2502.04052)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..span import Span, advance
from ..state import State
from .base import Mixer

MOST_DEPTH = 10


class ReMeDeState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    memory: Tensor  # [B, trees, M] float32


class Entmax15(torch.autograd.Function):
    """p_i = max(z_i / 2 - tau, 0)^2 with tau such that they sum to 1: a softmax that gives exact zeros (arXiv 1905.05702)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        z = (z - z.amax(-1, keepdim=True)) / 2
        top = z.sort(-1, descending=True).values
        count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        mean, square = top.cumsum(-1) / count, top.square().cumsum(-1) / count
        tau = mean - ((1 / count) - (square - mean.square())).clamp(min=0).sqrt()  # if the support were the k largest, for every k
        support = (tau <= top).sum(-1, keepdim=True)
        p = (z - tau.gather(-1, support - 1)).clamp(min=0).square()
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (p,) = ctx.saved_tensors
        root = p.sqrt()
        return root * (grad - (grad * root).sum(-1, keepdim=True) / root.sum(-1, keepdim=True))


def entmax15(z: Tensor) -> Tensor:
    """1.5-entmax over the last dimension."""
    return Entmax15.apply(z)  # type: ignore[return-value]


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard`, to the bit, with the gradients of both."""
    return hard + (soft - soft.detach())


@system(
    "remede",
    kind="forecasting",
    paper="arXiv:2502.04052",
    year=2025,
    name="ReMeDe (recurrent memory decision trees)",
    state="trees x memory",
    parity="hard traversal of the trees, node by node",
    claim="Delayed copy and parity at lags of 3 to 10 are solved where a tree without memory is at chance.",
)
class ReMeDe(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; every tree keeps a memory m of M numbers. A loop over tokens.

        node:   go right if u_f >= tau_f, u = [x_t, m_{t-1}], f its feature of the highest score
        leaf:   o_t = its answer             m_t = w * its value + (1 - w) * m_{t-1}, w its mask of 0s and 1s
        y = W_o [o of all trees] + b

    Our reading of how memory is wired: complete trees of `depth` questions, in which one leaf gives answer and update. Forward, every
    choice is hard, so what is remembered are values of leaves and any memory is exact; backward, straight through (GradTree, arXiv
    2305.03515): choice is "entmax" or "softmax" of the scores, a comparison is sigmoid(sharpness (u - tau)), a mask its sigmoid. These
    gradients are biased. trees: T independent ones. memory: M. answer: numbers in a leaf's answer.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 4,
        trees: int = 8,
        memory: int = 4,
        answer: int = 4,
        choice: str = "entmax",
        sharpness: float = 1.0,
    ):
        super().__init__()
        if choice not in ("entmax", "softmax"):
            raise UsageError(f"choice is {choice!r}; it may be 'entmax' or 'softmax'.")
        if not sharpness > 0:
            raise UsageError(f"sharpness is {sharpness!r}; it must be above 0.")
        if depth > MOST_DEPTH:
            raise UsageError(f"depth is {depth}; a tree has 2^depth leaves, all of which are computed, so it may be at most {MOST_DEPTH}.")
        self.choice, self.sharpness, self.depth, self.memory_size = choice, sharpness, depth, memory
        nodes, leaves, features = 2**depth - 1, 2**depth, dim + memory
        self.score = nn.Parameter(torch.randn(trees, nodes, features))
        self.threshold = nn.Parameter(0.5 * torch.randn(trees, nodes, features))
        self.answer = nn.Parameter(torch.randn(trees, leaves, answer))
        self.value = nn.Parameter(torch.randn(trees, leaves, memory))
        self.write = nn.Parameter(torch.randn(trees, leaves, memory))
        self.out = nn.Linear(trees * answer, dim)

    def forward(self, x: Tensor, state: ReMeDeState | None = None, span: Span | None = None) -> tuple[Tensor, ReMeDeState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        dtype, dim = accumulate_dtype(x), x.shape[2]
        u, trees = x.to(dtype), len(self.score)
        score, tau = self.score.to(dtype), self.threshold.to(dtype)
        chosen = score.argmax(-1, keepdim=True)  # [trees, N, 1]
        soft = entmax15(score) if self.choice == "entmax" else score.softmax(-1)
        soft_x, soft_m = soft[..., :dim], soft[..., dim:].transpose(1, 2)  # [trees, N, dim], [trees, M, N]
        from_x = chosen[..., 0] < dim  # [trees, N]; else from the memory
        hard_x = u[..., chosen[..., 0].clamp(max=dim - 1)] * from_x  # [B, T, trees, N]
        margin_x = hard_x - tau.gather(-1, chosen)[..., 0]
        if torch.is_grad_enabled():  # adds 0; its gradient to the scores is that of sum_f p_f (u_f - tau_f)
            expected = torch.einsum("btf,knf->btkn", u.detach(), soft_x) - (soft * tau.detach()).sum(-1)
            margin_x = straight_through(margin_x, expected)
        write = (self.write.to(dtype) >= 0).to(dtype)
        write = straight_through(write, self.write.to(dtype).sigmoid())
        leaf = torch.cat([self.answer.to(dtype), write * self.value.to(dtype), write], -1)  # [trees, L, answer + 2 M]
        m = state.memory if state else u.new_zeros(len(x), trees, self.memory_size)
        tree, pick_m = torch.arange(trees, device=x.device)[:, None], (chosen[..., 0] - dim).clamp(min=0)
        answers = []
        for t in range(x.shape[1]):
            if span is not None and span.reset is not None:
                m = m.masked_fill(span.reset[:, t, None, None], 0)
            margin = margin_x[:, t] + m[:, tree, pick_m] * ~from_x  # [B, trees, N]
            if torch.is_grad_enabled():
                margin = straight_through(margin, torch.einsum("bkm,kmn->bkn", m.detach(), soft_m))
            path = self.paths(margin)
            held = torch.einsum("bkl,klv->bkv", path, leaf)  # one 1 a row: exact
            answer, value, mask = held.split([held.shape[-1] - 2 * self.memory_size, self.memory_size, self.memory_size], -1)
            new = value + (1 - mask) * m
            m = new if span is None or span.valid is None else torch.where(span.valid[:, t, None, None], new, m)
            answers.append(answer.flatten(1))
        y = self.out(torch.stack(answers, 1).to(x.dtype))
        return y, ReMeDeState(seen=advance(seen, x.shape[1], span), memory=m)

    def paths(self, margin: Tensor) -> Tensor:
        """Margins of all nodes [..., N], level by level -> the leaf reached as a one-hot [..., L]: the product over its path."""
        right = straight_through((margin >= 0).to(margin.dtype), (self.sharpness * margin).sigmoid())
        path = torch.ones_like(right[..., :1])
        for level in range(self.depth):
            step = right[..., 2**level - 1 : 2 ** (level + 1) - 1]
            path = torch.stack([path * (1 - step), path * step], -1).flatten(-2)
        return path
