"""What a run shows while it runs: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Reporter:
    """Context manager; `step(step, row)` after every update, `say(text)` for a line. quiet: shows nothing."""

    every = 15.0  # seconds between lines where there is no terminal

    def __init__(self, steps: int, start: int, quiet: bool):
        self.steps, self.quiet, self.bar = steps, quiet, None
        self.began, self.start, self.said = time.monotonic(), start, time.monotonic()

    def __enter__(self) -> Reporter:
        if not self.quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Progress(*columns, transient=False)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.steps, completed=self.start)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, step: int, row: dict[str, Any]) -> None:
        if self.quiet:
            return
        text = f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s"
        if "accuracy" in row:
            text += f"  accuracy {row['accuracy']:.3f}"
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        elif now - self.said >= self.every or step == self.steps:
            left = (now - self.began) / max(1, step - self.start) * (self.steps - step)
            self.said = now
            print(f"step {step}/{self.steps}  {text}  {_clock(left)} left", flush=True)

    def say(self, text: str) -> None:
        if not self.quiet:
            (self.bar.console.print if self.bar is not None else print)(text)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
