"""The catalog: entered by a decorator, found by slug or alias, and helpful about what it does not have."""

from __future__ import annotations

import pytest

import remanence as rm
from remanence import catalog as module_or_function
from remanence.catalog import _ALIASES, _ENTRIES, Entry, find, system
from remanence.errors import UnknownName, UsageError


@pytest.fixture
def entry():
    """A system that is registered for one test."""

    @system("zz-test", kind="zz-kind", paper="none", year=2000, aliases=("zz-other",), example={"heads": 2}, exempt={"compile": "because"})
    class Thing:
        """The first line.

        The rest.
        """

    yield Thing
    del _ENTRIES["zz-test"], _ALIASES["zz-other"]


def test_register_and_find(entry: type) -> None:
    found = rm.find("zz-test")
    assert isinstance(found, Entry) and found.builder is entry and entry.slug == "zz-test"
    assert (found.name, found.kind, found.paper, found.year) == ("Thing", "zz-kind", "none", 2000)
    assert (dict(found.example), dict(found.exempt), found.aliases) == ({"heads": 2}, {"compile": "because"}, ("zz-other",))
    assert found.summary == "The first line."
    assert find("zz-other") is found and find("zz-other", ("mixer", "zz-kind")) is found
    assert found in rm.catalog() and rm.catalog("zz-kind") == [found]
    with pytest.raises(AttributeError):
        found.slug = "other"


def test_a_slug_names_one_system(entry: type) -> None:
    before = dict(_ENTRIES), dict(_ALIASES)
    for slug, aliases in (("zz-test", ()), ("zz-other", ()), ("zz-new", ("zz-test",)), ("zz-new", ("zz-other",))):
        with pytest.raises(UsageError, match="already registered"):
            system(slug, kind="zz-kind", paper="none", year=2000, aliases=aliases)(object)
    assert before == (_ENTRIES, _ALIASES)


def test_an_exemption_names_a_law() -> None:
    with pytest.raises(UnknownName, match="'padings' is not known; did you mean padding"):
        system("zz-new", kind="mixer", paper="none", year=2000, exempt={"padings": "none"})
    assert "zz-new" not in _ENTRIES


def test_what_is_not_known_gets_the_nearest() -> None:
    with pytest.raises(UnknownName, match="system 'gated-deltanett' is not known; did you mean gated-deltanet"):
        rm.find("gated-deltanett")
    with pytest.raises(UnknownName, match="mixer 'atention' is not known; did you mean attention"):
        rm.mixer("atention")
    with pytest.raises(UnknownName, match="kind 'mixers' is not known; did you mean mixer"):
        rm.catalog("mixers")
    with pytest.raises(UnknownName, match="known: "):
        rm.catalog("qqqq")
    with pytest.raises(UnknownName, match="benchmark 'attention' is not known"):
        rm.task("attention")
    with pytest.raises(UnknownName, match="model 'no-such-preset' is not known"):
        rm.model("no-such-preset")
    with pytest.raises(UnknownName, match="segment-memory or external-memory 'attention'"):
        rm.memory("attention", backbone=None)


def test_the_catalog_is_sorted_and_has_both_first_mixers() -> None:
    slugs = [entry.slug for entry in rm.catalog()]
    assert slugs == sorted(slugs) and len(set(slugs)) == len(slugs)
    assert {"attention", "gated-deltanet"} <= {entry.slug for entry in rm.catalog("mixer")}
    assert callable(module_or_function)  # `remanence.catalog` is the function; the module is found by import statements


@pytest.mark.parametrize("entry", rm.catalog(), ids=lambda entry: entry.slug)
def test_every_entry_says_what_it_is(entry: Entry) -> None:
    assert entry.slug == entry.slug.lower() and " " not in entry.slug
    assert entry.name and entry.paper and 1980 <= entry.year <= 2030
    assert len(entry.summary) > 10 and (entry.builder.__doc__ or "").strip()
    assert rm.find(entry.slug) is entry
    for alias in entry.aliases:
        assert rm.find(alias) is entry
