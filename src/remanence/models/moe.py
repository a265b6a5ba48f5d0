"""Mixture of experts: a feed-forward that sends every token to a few of many, as Linear-MoE has after linear mixers (arXiv 2503.05447)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError, positive
from ..mixers.parts import GatedFFN
from ..ops.backend import accumulate_dtype
from ..span import Span


class MoE(nn.Module):
    """y = sum over the k experts of the largest router logits of g_e FFN_e(x); no token is dropped, whatever the load.

        z = W_r x, in float32 at least        g = softmax of the k largest z;  for k = 1 the softmax over all z (Switch), or g would be 1

    Every expert is a SwiGLU of `hidden` channels. Which experts a token gets depends on that token only, so a Decoder of such blocks is as
    causal and as cuttable as a dense one; a tie in the router within rounding error is the exception.
    """

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int = 2):
        super().__init__()
        positive(experts=experts, top_k=top_k)
        if top_k > experts:
            raise UsageError(f"top_k is {top_k}; there are {experts} experts.")
        self.top_k = top_k
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(GatedFFN(dim, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # [M, D]
        logits = self.router(tokens)
        logits = logits.to(accumulate_dtype(logits))
        top, chosen = logits.topk(self.top_k, -1)  # [M, k]
        share = logits.softmax(-1).gather(1, chosen) if self.top_k == 1 else top.softmax(-1)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            if len(token):
                y = y.index_add(0, token, expert(tokens[token]) * share[token, place, None].to(y.dtype))
        return y.view_as(x)


class Routes(NamedTuple):
    """What one layer's router said in one call."""

    logits: Tensor  # [M, E], the M tokens of [B, T] row by row
    top_k: int


@contextmanager
def routed(model: nn.Module) -> Iterator[list[Routes]]:
    """Within the block, the Routes of every MoE layer are appended to the list it yields, call by call. UsageError if there is none."""
    routes: list[Routes] = []
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise UsageError("the model has no mixture of experts; give its layers, or its ModelConfig, experts=n.")

    def watch(layer: MoE) -> Any:
        return layer.router.register_forward_hook(lambda _module, _inputs, z: routes.append(Routes(z, layer.top_k)))

    hooks = [watch(layer) for layer in layers]
    try:
        yield routes
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(routes: list[Routes], valid: Tensor | None = None) -> Tensor:
    """The load-balance loss of Switch (arXiv 2101.03961, eq. 4), extended to k experts; mean over the layers' calls:

        E sum_e f_e p_e        f_e: tokens sent to e, per token; p_e: the mean probability of e        (k if balanced, at most E)

    f passes no gradient. valid, bool [B, T]: which tokens count, in the order in which the layer read them; None for all.
    """
    losses = []
    for logits, top_k in routes:
        z = logits.to(accumulate_dtype(logits))
        z = z if valid is None else z[valid.flatten()]
        p, count = z.softmax(-1), torch.bincount(z.topk(top_k, -1).indices.flatten(), minlength=z.shape[-1])
        losses.append(p.shape[-1] * (count.to(p.dtype) / len(p) * p.mean(0)).sum())
    return torch.stack(losses).mean()


def balanced(loss: Callable[..., Any], weight: float = 0.01) -> Callable[..., Any]:
    """`loss`, one for the training loop, with `weight` times the load-balance loss added for every target; reports it as "balance".

    The published weight is 0.01. Padding, which a Model moves to the right, is not counted.
    """

    def both(model: nn.Module, piece: Any, state: Any) -> tuple[Any, Any, dict[str, Tensor]]:
        with routed(model) as routes:
            value, state, metrics = loss(model, piece, state)
        span: Span | None = piece.span
        balance = balance_loss(routes, None if span is None else span.right_padded()[0].valid)
        return None if value is None else value + weight * balance * piece.count, state, metrics | {"balance": balance}

    return both
