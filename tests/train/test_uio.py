"""Randomised incremental back-propagation against full gradients, and in expectation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.errors import UsageError
from remanence.train.uio import incremental
from segment_memories import build, ids_of

S = 6


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tbptt", [5, 4, 9])
def test_parity_with_room_for_every_chunk_it_is_the_full_gradient(tbptt: int) -> None:
    """UIO-LLMs itself: the loss of every segment to the memories of all before. Of 5 chunks 4 are read again."""
    model, ids = build("uio-llms", segment=S, slots=2, rank=2, train_base=True), ids_of(5 * S)
    chunks = list(zip(ids.split(S, 1), ids.roll(-1, 1).split(S, 1)))

    def loss(chunk, memories) -> Tensor:
        return F.cross_entropy(model.read(chunk[0], memories).flatten(0, 1), chunk[1].flatten(), reduction="sum")

    got = incremental(lambda chunk: model.compress(model.embed(chunk[0])), loss, chunks, tbptt)
    grads = gradients(model)
    model.zero_grad()
    want = F.cross_entropy(model(ids).logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="sum")
    want.backward()
    assert_close("loss", got, want.detach(), 1e-12)
    full = gradients(model)
    assert_gradients_close("uio", grads, full, 1e-9)
    together = [torch.cat([g.flatten() for g in found.values()]) for found in (grads, full)]
    assert_parity("uio-llms", "full back-propagation (tbptt >= chunks)", together[0], together[1], 1e-9)


class Toy(nn.Module):
    """A linear toy: memories w x_c, and the loss of chunk c is y_c . sum of the memories before it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.eye(3, dtype=torch.float64))

    def encode(self, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        return (chunk[0] @ self.w,)

    @staticmethod
    def loss(chunk: tuple[Tensor, Tensor], memories: list[tuple[Tensor]]) -> Tensor | None:
        return sum((chunk[1] * memory[0]).sum() for memory in memories) if memories else None  # type: ignore[return-value]


def kept(draws: int, chunks: int, tbptt: int) -> Tensor:
    """How often the gradient of loss c reaches memory a, [c, a]: x_a = e_a, y_c = 10^c tells them apart."""
    random, counts = torch.Generator().manual_seed(0), torch.zeros(chunks, chunks)
    for _ in range(draws):
        toy = nn.Module()
        toy.w = nn.Parameter(torch.zeros(chunks, chunks, dtype=torch.float64))
        items = [(torch.eye(chunks, dtype=torch.float64)[c], torch.eye(chunks, dtype=torch.float64)[c]) for c in range(chunks)]
        incremental(lambda item, toy=toy: (item[0] @ toy.w,), Toy.loss, items, tbptt, random)
        if toy.w.grad is not None:
            counts += toy.w.grad.T.float()
    return counts / draws


def test_the_chance_of_a_path_is_that_of_the_reservoir() -> None:
    """Memory a of t chunks is in the reservoir when loss c is read with probability tbptt / c: the same for all a < c."""
    chunks, tbptt = 6, 2
    chance = kept(300, chunks, tbptt)
    for c in range(1, chunks):
        want = min(1.0, tbptt / c)
        assert float((chance[c, :c] - want).abs().max()) < 0.1, (c, chance[c, :c])
    assert not chance.triu().any()


def test_what_is_lost_is_only_the_dropped_part() -> None:
    toy = Toy()
    items = [(torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)) for _ in range(4)]
    total = incremental(toy.encode, toy.loss, items, 10)
    want = sum(items[c][1] @ items[a][0] for c in range(4) for a in range(c))
    assert_close("value", total, want, 1e-12)
    exact = sum(torch.outer(items[a][0], items[c][1]) for c in range(4) for a in range(c))
    assert_close("gradient", toy.w.grad, exact, 1e-12)


def test_bad_arguments() -> None:
    toy = Toy()
    with pytest.raises(UsageError, match="tbptt is 0"):
        incremental(toy.encode, toy.loss, [1], 0)
    with pytest.raises(UsageError, match="no chunks"):
        incremental(toy.encode, toy.loss, [], 2)
