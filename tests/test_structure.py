"""The shape of the package: imports point only downwards, and what is optional or heavy is imported only where it must be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import remanence
from remanence import State

ROOT = Path(remanence.__file__).parent
LAYERS = (
    ("errors",),
    ("files", "runtime", "data"),
    ("span", "state"),
    ("catalog", "corpus", "tokenizers"),
    ("ops",),
    ("mixers", "tables"),
    ("models",),
    ("memory", "banks", "depth", "caches", "inference"),
    ("hf", "convert"),
    ("train", "tasks"),
    ("evaluate", "inspect", "session"),
    ("recipes", "serve", "text", "domains"),
    ("doctor", "demo"),
    ("cli", "__main__"),
    ("__init__",),
)
"""Bottom up. A module may import from its own layer and from those below it."""
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
ONLY_IN = {
    "triton": lambda path: path.name == "triton.py",
    "fla": lambda path: path.name == "triton.py",
    "transformers": lambda path: path.name == "hf.py" or path.match("evaluate/speed.py"),  # the peers that speed is compared with
    "datasets": lambda path: path.name == "hf.py",
    "matplotlib": lambda path: path.parts[0] in ("evaluate", "inspect"),
}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def part(module: tuple[str, ...]) -> str:
    """The part of the package that a dotted name belongs to: ("ops", "delta") -> "ops"; () is the package itself."""
    return module[0] if module else "__init__"


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what) for every import in a file, inside functions too: "remanence.<part>" or the name of another package."""
    package = path.parent.parts
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names = alias.name.split(".")
                yield node.lineno, f"remanence.{part(tuple(names[1:]))}" if names[0] == "remanence" else names[0]
        elif isinstance(node, ast.ImportFrom):
            names = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                names = (*package[: len(package) - node.level + 1], *names)
            elif names[0] != "remanence":
                yield node.lineno, names[0]
                continue
            else:
                names = names[1:]
            if names:
                yield node.lineno, f"remanence.{part(names)}"
            else:  # from .. import name: a module of the package, or something its __init__ defines
                for alias in node.names:
                    if alias.name != "__version__":  # a constant of the package
                        yield node.lineno, f"remanence.{alias.name if alias.name in LEVEL else '__init__'}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downwards(path: Path) -> None:
    own = part(path.with_suffix("").parts)
    assert own in LEVEL, f"{path} belongs to no layer: give {own!r} its place in LAYERS"
    for line, name in imported(path):
        if name.startswith("remanence."):
            other = name.removeprefix("remanence.")
            assert other in LEVEL, f"{path}:{line} imports {other!r}, which belongs to no layer"
            assert LEVEL[other] <= LEVEL[own], f"{path}:{line} imports {other} from above {own}"
        elif name in ONLY_IN:
            assert ONLY_IN[name](path), f"{path}:{line} imports {name}, which this file may not"


def test_the_check_sees_upward_imports() -> None:
    found = {name for _, name in imported(Path("models/decoder.py"))}
    assert {"remanence.catalog", "remanence.mixers", "remanence.models", "torch"} <= found
    assert "remanence.span" in {name for _, name in imported(Path("ops/delta/__init__.py"))}


def test_importing_the_package_is_light() -> None:
    heavy = ["matplotlib", "transformers", "rich", "datasets", "tyro", "fastapi", "triton"]
    code = f"import sys, torch; before = set(sys.modules); import remanence; print(sorted(({{*sys.modules}} - before) & {{*{heavy}}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_state_classes_have_names_of_their_own() -> None:
    """A saved state names its class; two classes of one name would be mistaken for each other."""

    def below(kind: type[State]) -> Iterator[type[State]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    classes = {kind for kind in below(State) if kind.__module__.startswith("remanence")}
    assert classes
    twice = [name for name, count in Counter(kind.__name__ for kind in classes).items() if count > 1]
    assert not twice


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_says_what_it_is(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
