"""The register of systems: what `remanence list`, the docs, the tests and the benchmarks all read.

A system enters by one decorator on its class::

    @system("gated-deltanet", kind="mixer", paper="arXiv:2412.06464", year=2024)
    class GatedDeltaNet(Mixer): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import UsageError, unknown

LAWS = ("any-cut", "state-value", "padding", "packing", "batch", "forms", "gradients", "compile", "bf16")
"""The names of the laws that an entry may be exempt from; tests/laws asserts each one that is not."""

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One published system. `builder` makes it; `exempt` maps the name of a law it cannot obey to the reason.

    example: keyword arguments that make a small instance, for tests and benchmarks. aliases: other names it answers to. state: numbers
    kept for one row, as a formula. parity: what it is checked against. claim: the small-scale claim. recipe: the run that tests it.
    """

    slug: str
    kind: str
    name: str
    paper: str
    year: int
    builder: Callable[..., Any]
    exempt: Mapping[str, str] = field(default_factory=dict)
    example: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    state: str = ""
    parity: str = ""
    claim: str = ""
    recipe: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Its kind and, where the builder plays one, its role: a token mixer published for RL is of kind 'rl' and is a 'mixer' too."""
        role = getattr(self.builder, "role", None)
        return (self.kind,) if role in (None, self.kind) else (self.kind, role)

    @property
    def summary(self) -> str:
        """The first line of the builder's docstring."""
        return (self.builder.__doc__ or "").strip().split("\n")[0]


_ENTRIES: dict[str, Entry] = {}
_ALIASES: dict[str, str] = {}


def system(
    slug: str,
    *,
    kind: str,
    paper: str,
    year: int,
    name: str | None = None,
    aliases: tuple[str, ...] = (),
    exempt: Mapping[str, str] | None = None,
    example: Mapping[str, Any] | None = None,
    state: str = "",
    parity: str = "",
    claim: str = "",
    recipe: str = "",
) -> Callable[[T], T]:
    """Class decorator: put a system into the catalog and hand the class back unchanged. Raises UsageError on a slug that is taken."""
    for law in exempt or {}:
        if law not in LAWS:
            raise unknown(f"law (exemption of {slug})", law, LAWS)

    def register(builder: T) -> T:
        for key in (slug, *aliases):
            if key in _ENTRIES or key in _ALIASES:
                raise UsageError(f"the slug {key!r} is already registered; a slug names one system.")
        title = name or getattr(builder, "__name__", slug)
        entry = Entry(
            slug, kind, title, paper, year, builder, dict(exempt or {}), dict(example or {}), tuple(aliases), state, parity, claim, recipe  # type: ignore[arg-type]
        )
        _ENTRIES[slug] = entry
        _ALIASES.update(dict.fromkeys(aliases, slug))
        if isinstance(builder, type):
            builder.slug = slug  # type: ignore[attr-defined]
        return builder

    return register


def catalog(kind: str | None = None) -> list[Entry]:
    """Every registered system, or those of one kind ('mixer', 'segment-memory', 'benchmark', ...), sorted by slug."""
    kinds = {kind for entry in _ENTRIES.values() for kind in entry.kinds}
    if kind is not None and kind not in kinds:
        raise unknown("kind", kind, kinds)
    return sorted((entry for entry in _ENTRIES.values() if kind is None or kind in entry.kinds), key=lambda entry: entry.slug)


def find(slug: str, kinds: tuple[str, ...] | None = None) -> Entry:
    """The entry of a slug or alias, optionally of certain kinds only. Raises UnknownName with the nearest names."""
    known = {key: entry for key, entry in _ENTRIES.items() if kinds is None or not set(kinds).isdisjoint(entry.kinds)}
    key = _ALIASES.get(slug, slug)
    if key not in known:
        raise unknown(" or ".join(kinds) if kinds else "system", slug, known)
    return known[key]
