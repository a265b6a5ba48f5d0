"""How much of a token is still in a memory, and how much of a layer reaches a later one: MemMamba's two fidelities (arXiv 2510.03279).

ETMF (expected token memory fidelity, horizontal): tokens from the state some tokens later. ECLMF (expected cross-layer memory fidelity,
vertical): hidden vectors of layer l from those of layer l + g. The paper's ECLMF is a mutual information; our reading of both is the mean
cosine between a vector and its best linear reconstruction, by ridge regression that is fitted on one half of the tokens and scored on
the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ShapeError, UsageError
from ..mixers.base import Mixer
from ..state import State


def reconstruct(source: Tensor, target: Tensor, ridge: float = 1e-3) -> float:
    """Mean cosine between target [n, D] and its linear reconstruction from source [n, M], on tokens that it was not fitted to.

    Every second token is for fitting, the others for scoring. ridge: the penalty, as a fraction of the sources' mean square. Computes in
    float64. Raises ShapeError unless there are as many sources as targets, at least 4.
    """
    if source.ndim != 2 or target.ndim != 2 or len(source) != len(target) or len(source) < 4:
        shapes = f"{list(source.shape)} and {list(target.shape)}"
        raise ShapeError(f"source and target have shapes {shapes}; expected [n, M] and [n, D], n >= 4.")
    source, target = source.detach().double(), target.detach().double()
    seen, new = slice(0, None, 2), slice(1, None, 2)
    middle, mean = source[seen].mean(0), target[seen].mean(0)
    x, y = source[seen] - middle, target[seen] - mean
    penalty = ridge * x.square().mean() * len(x)
    gram = x @ x.T  # [n / 2, n / 2]: a state has more numbers than there are tokens
    gram.diagonal().add_(penalty.clamp(min=1e-12))
    weights = x.T @ torch.linalg.solve(gram, y)  # [M, D]
    found = (source[new] - middle) @ weights + mean
    return F.cosine_similarity(found, target[new], dim=-1).mean().item()


@torch.no_grad()
def states_after(mixer: Mixer, x: Tensor) -> Tensor:
    """The state after every token as one vector, [B, T, M]: its floating-point tensors of fixed size, flattened. x [B, T, dim]."""
    rows, state = [], None
    for t in range(x.shape[1]):
        _, state = mixer(x[:, t : t + 1], state)
        rows.append(_vector(state))
    return torch.stack(rows, 1)


def _vector(state: State) -> Tensor:
    return torch.cat([tensor.flatten(1).double() for tensor in state.tensors() if tensor.is_floating_point()], 1)


def etmf(tokens: Tensor, states: Tensor, delay: int, ridge: float = 1e-3) -> float:
    """Horizontal fidelity: tokens [B, T, D] from the states [B, T, M] that stood `delay` >= 0 tokens later; 1 is all, 0 nothing."""
    if tokens.shape[:2] != states.shape[:2] or not 0 <= delay < tokens.shape[1]:
        raise UsageError(
            f"tokens have shape {list(tokens.shape)}, states {list(states.shape)} and delay is {delay}; "
            "the first two dimensions must agree and delay be in 0..T - 1."
        )
    return reconstruct(states[:, delay:].flatten(0, 1), tokens[:, : tokens.shape[1] - delay].flatten(0, 1), ridge)


def eclmf(earlier: Tensor, later: Tensor, ridge: float = 1e-3) -> float:
    """Vertical fidelity: the hidden vectors of a layer, earlier [B, T, D], from those of a later one [B, T, M]."""
    if earlier.shape[:2] != later.shape[:2]:
        raise ShapeError(f"earlier has shape {list(earlier.shape)} and later {list(later.shape)}; the first two dimensions must agree.")
    return reconstruct(later.flatten(0, 1), earlier.flatten(0, 1), ridge)
