"""Randomised incremental back-propagation: every chunk has the same chance of a long path for its gradients (arXiv 2406.18173)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import UsageError, positive

Item = TypeVar("Item")
Memory = Sequence[Tensor]
"""What one chunk leaves behind for later ones."""


def incremental(
    encode: Callable[[Item], Memory],
    loss: Callable[[Item, list[Memory]], Tensor | None],
    chunks: Sequence[Item],
    tbptt: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Add to every parameter's .grad that of L = sum_c loss(chunk_c, [encode(chunk_0), .., encode(chunk_{c-1})]); returns L, detached.

        for c = 0, 1, ..    back-propagate loss_c, which stops at the memories before it: each sums what arrives
                            m_c = encode(chunk_c) enters a reservoir of `tbptt` chunks: always while there is room, else in the place of a
                            random one with probability tbptt / (c + 1)
                            a chunk that leaves the reservoir, or does not enter: what has arrived at its memory goes back through encode
        at the end          the same for those still in the reservoir, the newest first

    At most `tbptt` graphs of encode are alive, and one of loss. With tbptt >= the number of chunks this is the exact gradient. Otherwise
    what arrives at a memory after its chunk has left is lost, and as in the public code no weight makes up for it: the chunks are treated
    alike, but the sum is biased towards zero. generator: of the draws.
    """
    positive(tbptt=tbptt)
    if not chunks:
        raise UsageError("incremental got no chunks; it needs at least one.")
    memories: list[Memory] = []  # leaves, whose .grad is what has arrived
    graphs: dict[int, Memory] = {}
    reservoir: list[int] = []
    losses = []

    def close(chunk: int) -> None:
        made = graphs.pop(chunk)
        pairs = [(end, leaf.grad) for end, leaf in zip(made, memories[chunk], strict=True) if leaf.grad is not None and end.requires_grad]
        if pairs:
            torch.autograd.backward([end for end, _ in pairs], [grad for _, grad in pairs])

    for index, item in enumerate(chunks):
        value = loss(item, list(memories))
        if value is not None:
            losses.append(value.detach())
            if value.requires_grad:
                value.backward()
        del value
        if index == len(chunks) - 1:
            break  # nothing reads the last one's memory
        graphs[index] = encode(item)
        memories.append([x.detach().requires_grad_(x.is_floating_point()) for x in graphs[index]])
        if index < tbptt:
            reservoir.append(index)
            continue
        place = int(torch.randint(index + 1, (), generator=generator))
        leaving = index
        if place < tbptt:
            leaving, reservoir[place] = reservoir[place], index
        close(leaving)
    for chunk in sorted(reservoir, reverse=True):
        close(chunk)
    return sum(losses, torch.zeros(()))
