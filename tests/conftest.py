"""Settings of the whole suite: one seed, repeatable hypothesis draws, and memory that is NaN until someone writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for on an accelerator
settings.register_profile(
    "remanence", max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("remanence")


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return NaN (the largest value for integers), so no result can depend on what was there before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """A program that `runtime.tune` was called in flushes denormals; hypothesis, in the same process, must be able to draw them again."""
    yield
    torch.set_flush_denormal(False)
