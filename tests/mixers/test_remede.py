"""ReMeDe: hard traversal is the tensor form, straight-through gradients are what they say, and it copies with a delay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.mixers.remede import ReMeDe, entmax15


def traverse(mixer: ReMeDe, x: Tensor) -> tuple[Tensor, Tensor]:
    """One row [T, dim], one question after the other: answers of all trees [T, trees A], and the memories at the end."""
    memory = [[0.0] * mixer.memory_size for _ in mixer.score]
    answers = []
    for x_t in x.tolist():
        row = []
        for k in range(len(mixer.score)):
            features, node = [*x_t, *memory[k]], 0
            for _ in range(mixer.depth):
                f = max(range(len(features)), key=mixer.score[k, node].tolist().__getitem__)
                node = 2 * node + 1 + (features[f] >= mixer.threshold[k, node, f].item())
            leaf = node - (2**mixer.depth - 1)
            row += mixer.answer[k, leaf].tolist()
            write, value = mixer.write[k, leaf].tolist(), mixer.value[k, leaf].tolist()
            memory[k] = [v if w >= 0 else m for v, w, m in zip(value, write, memory[k])]
        answers.append(row)
    return torch.tensor(answers), torch.tensor(memory)


@pytest.mark.parametrize("choice", ["entmax", "softmax"])
@pytest.mark.parametrize("dim", [1, 6])
def test_parity_hard_traversal(choice: str, dim: int) -> None:
    torch.manual_seed(0)
    mixer = rm.mixer("remede", dim=dim, depth=3, trees=5, memory=3, choice=choice)
    x = torch.randn(2, 40, dim)
    y, state = mixer(x)
    with torch.no_grad():
        quiet, _ = mixer(x)
    for row in range(2):
        answers, memory = traverse(mixer, x[row])
        assert torch.equal(state.memory[row], memory)
        assert_parity("remede", "hard traversal, node by node", y[row], mixer.out(answers))
    assert torch.equal(y, quiet)  # what is there for the gradients changes no value


def test_straight_through_gradients() -> None:
    """One tree, one question, two tokens: the gradients of the definition with a one-hot p and a hard step, both straight through."""
    torch.manual_seed(1)
    mixer = rm.mixer("remede", dim=2, depth=1, trees=1, memory=1, answer=1).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    leaves = [x, mixer.score, mixer.threshold, mixer.answer, mixer.value, mixer.write]
    got = torch.autograd.grad((mixer(x)[0] * torch.arange(12).view(3, 2, 2)).sum(), leaves)

    p = entmax15(mixer.score)
    p = torch.nn.functional.one_hot(p.argmax(-1), 3) + p - p.detach()
    w = (mixer.write >= 0).double() + mixer.write.sigmoid() - mixer.write.sigmoid().detach()
    m, outputs = torch.zeros(3, 1, 1, dtype=torch.float64), []
    for x_t in x.unbind(1):
        u = torch.cat([x_t[:, None], m], -1)[:, :, None]  # [B, trees, 1, F]
        soft = ((u - mixer.threshold) * p).sum(-1).sigmoid()
        d = (soft >= 0.5).double() + soft - soft.detach()
        path = torch.cat([1 - d, d], -1)  # [B, trees, 2]
        outputs.append(mixer.out(torch.einsum("bkl,kla->bka", path, mixer.answer).flatten(1)))
        keep = torch.einsum("bkl,klm->bkm", path, w)
        m = torch.einsum("bkl,klm->bkm", path, w * mixer.value) + (1 - keep) * m
    want = torch.autograd.grad((torch.stack(outputs, 1) * torch.arange(12).view(3, 2, 2)).sum(), leaves)
    for name, a, b in zip(("x", "score", "threshold", "answer", "value", "write"), got, want):
        assert_close(name, a, b, 1e-12)


def test_entmax() -> None:
    """Sums to 1, has exact zeros, solves its own optimality condition by bisection, and its gradient is right."""
    z = 2 * torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = z.amax(-1, keepdim=True) / 2 - 1, z.amax(-1, keepdim=True) / 2
    for _ in range(60):
        tau = (low + high) / 2
        over = (z / 2 - tau).clamp(min=0).square().sum(-1, keepdim=True) > 1
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    p = entmax15(z)
    assert_close("entmax", p, (z / 2 - low).clamp(min=0).square(), 1e-12)
    assert bool((p == 0).any()) and torch.allclose(p.sum(-1), torch.ones(7, dtype=torch.float64))
    assert torch.autograd.gradcheck(entmax15, (z.requires_grad_(),))
    assert torch.allclose(entmax15(torch.zeros(1, 4)), torch.full((1, 4), 0.25))


def test_learns_a_delayed_copy() -> None:
    """The claim in small: the bit before the last; without memory it is a coin toss."""
    torch.manual_seed(0)
    mixer = rm.mixer("remede", dim=1, depth=3, trees=16, memory=2, answer=1)
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.05)
    for _ in range(120):
        bits = torch.randint(2, (64, 12, 1)).float() * 2 - 1
        loss = (mixer(bits)[0][:, 1:] - bits[:, :-1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bits = torch.randint(2, (256, 30, 1)).float() * 2 - 1
    right = ((mixer(bits)[0][:, 1:] > 0) == (bits[:, :-1] > 0)).float().mean()
    assert right > 0.95


WRONG = [({"choice": "best"}, "choice is 'best'"), ({"sharpness": 0.0}, "sharpness"), ({"depth": 11}, "depth is 11")]


@pytest.mark.parametrize("hyper, message", WRONG)
def test_wrong_use(hyper: dict, message: str) -> None:
    with pytest.raises(rm.errors.UsageError, match=message):
        rm.mixer("remede", dim=4, **hyper)
