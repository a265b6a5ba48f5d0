"""Greedy generation from a state, for several rows at once."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..models import Model
from ..state import State


@torch.no_grad()
def greedy(model: Model, state: State, logits: Tensor, max_new: int, eos: Collection[int] = ()) -> list[list[int]]:
    """The most probable next tokens of each row, until one of `eos` (not included) or `max_new` tokens.

    state: after the prompt; logits [B, V]: those of its last token. `state` stays as it is.
    """
    written: list[list[int]] = [[] for _ in logits]
    going = set(range(len(written)))
    for step in range(max_new):
        token = logits.argmax(-1)  # [B]
        for row, value in enumerate(token.tolist()):
            if value in eos:
                going.discard(row)
            elif row in going:
                written[row].append(value)
        if not going or step == max_new - 1:
            break
        out = model(token[:, None], state, logits="last")
        assert out.logits is not None
        state, logits = out.state, out.logits[:, 0]
    return written
