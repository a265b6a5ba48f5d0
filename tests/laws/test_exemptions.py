"""What a system is exempt from, it does break: an exemption that is not needed is an untested promise."""

from __future__ import annotations

import pytest

from . import test_any_cut, test_forms, test_gradients, test_padding_packing, test_precision_compile, test_state_value
from .systems import CHECKS, SYSTEMS, System

MODULES = (test_any_cut, test_forms, test_gradients, test_padding_packing, test_precision_compile, test_state_value)


def test_every_law_has_a_check() -> None:
    assert MODULES and all(CHECKS.values()), [name for name, checks in CHECKS.items() if not checks]


@pytest.mark.parametrize(
    ("system", "name"), [pytest.param(system, name, id=f"{system.name}-{name}") for system in SYSTEMS for name in system.exempt]
)
def test_the_exemption_is_needed(system: System, name: str) -> None:
    assert len(system.exempt[name]) > 20, f"{system.name} is exempt from {name!r} and gives no reason worth the name"
    for where, check in CHECKS[name]:
        if where(system):
            try:
                check(system=system)
            except Exception:
                return
    pytest.fail(f"{system.name} is exempt from {name!r} ({system.exempt[name]}) but obeys it: remove the exemption.")
