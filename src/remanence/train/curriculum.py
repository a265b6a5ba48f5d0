"""A curriculum over the number of segments: a memory must first learn to bridge one boundary, then two, then more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UsageError, positive


class Curriculum:
    """Stages of growing size: advance when the accuracy is good or the time is up, fall back when it is bad.

    stages: the size (number of segments, of pairs) at each stage. advance: mean accuracy over the last `window` steps of a stage (never
    fewer) that ends it. limit: steps after which a stage ends anyway, None for never. retreat: mean accuracy below which the stage before
    is taken up again, 0 for never. vary: each batch draws its size from 1 .. the stage's. What it remembers is `state()`, plain JSON data
    that a checkpoint holds; `size` is a pure function of that and of (seed, index).
    """

    def __init__(
        self,
        stages: Sequence[int],
        advance: float = 0.95,
        window: int = 50,
        limit: int | None = None,
        retreat: float = 0.0,
        vary: bool = False,
    ):
        if not stages or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in stages):
            raise UsageError(f"stages are {list(stages)}; they must be one or more integers >= 1.")
        positive(window=window, **({} if limit is None else {"limit": limit}))
        if not 0 <= retreat < advance:
            raise UsageError(f"retreat={retreat} and advance={advance}; 0 <= retreat < advance must hold.")
        self.stages, self.advance, self.window = tuple(stages), advance, window
        self.limit, self.retreat, self.vary = limit, retreat, vary
        self.stage, self.steps, self.recent = 0, 0, []

    @property
    def top(self) -> int:
        """The size of the current stage."""
        return self.stages[self.stage]

    def size(self, seed: int, index: int) -> int:
        """The size of batch `index`."""
        return int(np.random.default_rng([seed, index, 0xC0]).integers(1, self.top + 1)) if self.vary else self.top

    def observe(self, accuracy: float) -> bool:
        """Take in the accuracy of one step; True if the stage changed."""
        self.steps += 1
        self.recent = [*self.recent, float(accuracy)][-self.window :]
        full, mean = len(self.recent) == self.window, sum(self.recent) / len(self.recent)
        over = (full and mean >= self.advance) or (self.limit is not None and self.steps >= self.limit)
        if full and mean < self.retreat and self.stage > 0:
            return self._go(self.stage - 1)
        if over and self.stage + 1 < len(self.stages):
            return self._go(self.stage + 1)
        return False

    def _go(self, stage: int) -> bool:
        self.stage, self.steps, self.recent = stage, 0, []
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"stage": self.stage, "steps": self.steps, "recent": list(self.recent)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where `state()` was. Raises UsageError on a stage that this curriculum does not have."""
        if not 0 <= state["stage"] < len(self.stages):
            raise UsageError(f"the checkpoint is at stage {state['stage']} of a curriculum; this one has 0..{len(self.stages) - 1}.")
        self.stage, self.steps, self.recent = state["stage"], state["steps"], list(state["recent"])
