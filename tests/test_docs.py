"""The generated pages are what `make docs` would write, and README's commands and Python run as they stand."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "tools" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current():
    stale = [path.name for path, text in _make_docs().pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    assert not stale, f"run `make docs`: {stale}"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder where `remanence` is this environment's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_readme_commands(place):
    commands = [line for block in _blocks("bash") for line in block.splitlines() if line.strip() and not line.startswith("#")]
    assert any(line.startswith("remanence ask") for line in commands)
    for line in commands:
        if line.startswith("make "):
            done = subprocess.run(["make", "-n", "-C", str(ROOT), *line.split()[1:2]], capture_output=True, text=True)
        else:
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if line.startswith("remanence ask"):
            assert done.stdout.strip() == "garden"


def test_readme_python(place):
    for block in _blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        said = re.findall(r"# (.*)$", block, re.MULTILINE)
        printed = done.stdout.strip().splitlines()
        assert printed == [line.removeprefix("-> ") for line in said if line.startswith("-> ")]


def test_readme_pictures_exist():
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert images and all((ROOT / image).is_file() for image in images)
    assert shutil.which("make") is not None
