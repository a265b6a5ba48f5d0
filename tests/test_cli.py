"""The command line: what it prints and writes, and that every error of use is one line, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import remanence as rm
from remanence import cli
from remanence.cli import main
from remanence.evaluate import speed
from remanence.session import Session
from remanence.tokenizers import ByteTokenizer

TEXT = "It was the best of times, it was the worst of times. Mary went to the garden.\n" * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and other/ (same shape, other weights), wide/ (another shape), book.txt and its state s.safetensors."""
    at = tmp_path_factory.mktemp("cli")
    for seed, (name, dim) in enumerate({"model": 16, "other": 16, "wide": 32}.items()):
        torch.manual_seed(seed)
        rm.Decoder(rm.ModelConfig(vocab=259, dim=dim, layers=[{"mixer": "gated-deltanet", "heads": 2}])).save(at / name)
        ByteTokenizer().save(at / name)
    (at / "book.txt").write_text(TEXT)
    assert main(["read", str(at / "book.txt"), "--model", str(at / "model"), "--state", str(at / "s.safetensors")]) == 0
    return at


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail: exit code 2, nothing on stdout, one line on stderr. Returns the line."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("remanence: ") and "Traceback" not in err
        return err

    return run


def tree(at: Path) -> dict[str, bytes]:
    return {str(path.relative_to(at)): path.read_bytes() for path in sorted(at.rglob("*")) if path.is_file()}


def process(*argv: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "remanence.cli", *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_read_and_ask_in_two_processes_are_one(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "s.safetensors"
    read = process("read", folder / "book.txt", "--model", folder / "model", "--state", state)
    assert read.returncode == 0 and read.stderr == "" and f"Read {len(TEXT) - 1:,} tokens" in read.stdout
    asked = process("ask", "Where is Mary?", "--state", state, "--json")  # the state names its model
    assert asked.returncode == 0 and asked.stderr == ""
    session = Session(rm.load(folder / "model"), ByteTokenizer()).read(folder / "book.txt")
    here, there = session.ask("Where is Mary?"), json.loads(asked.stdout)
    assert there["logits_sha256"] == here.digest and there["answer"] == here.text and there["ids"] == list(here.ids)
    assert there["tokens"] == session.tokens and there["state_bytes"] == session.state_bytes and len(there["top"]) == 5


def test_ask_leaves_the_file_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(folder)
    assert main(["ask", "Where is Mary?", "--state", str(folder / "s.safetensors"), "--max-new", "3"]) == 0
    session = Session.load(folder / "s.safetensors", rm.load(folder / "model"), ByteTokenizer())
    assert capsys.readouterr().out == session.ask("Where is Mary?", 3).text + "\n"
    assert tree(folder) == before


def test_read_replaces_or_continues(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, model = str(tmp_path / "s.safetensors"), str(folder / "model")
    for flags in ([], [], ["--continue"]):
        assert main(["read", str(folder / "book.txt"), "--state", state, *([] if flags else ["--model", model]), *flags]) == 0
    out = capsys.readouterr().out.splitlines()
    one, two = len(TEXT) - 1, 2 * len(TEXT) - 1  # the last line end is held back until more text comes
    assert len(out) == 3 and f"({one:,} in all)" in out[1] and f"Read {two - one:,} tokens ({two:,} in all)" in out[2]
    whole = Session(rm.load(model), ByteTokenizer()).read(folder / "book.txt").read(folder / "book.txt")
    assert rm.State.load(state).digest() == whole.state.digest()


def test_eval_writes_rows_and_a_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "babilong", "--model", folder / "model", "--lengths", "0,300", "--samples", 3, "--json", tmp_path / "r.json"]
    assert main([str(word) for word in [*words, "--plot", tmp_path / "p.png", "--window", 100]]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["task"], row["length"], row["memory"], row["n"]) for row in rows] == [
        ("babilong", length, memory, 3) for length in (0, 300) for memory in ("on", "off")
    ]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry.slug for entry in rm.catalog()} == {entry["slug"] for entry in found}
    assert all({"slug", "kind", "name", "paper"} <= entry.keys() for entry in found)
    assert main(["list", "--kind", "mixer"]) == 0
    assert "gated-deltanet" in capsys.readouterr().out
    for entry in rm.catalog():
        assert main(["show", entry.slug]) == 0
        shown = capsys.readouterr().out
        assert entry.paper in shown and entry.summary in shown and all(law in shown for law in entry.exempt)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["torch"] == torch.__version__ and found["devices"][0]["name"] == "cpu"
    delta = next(rule for rule in found["rules"] if rule["rule"] == "delta")
    assert (delta["one_token"], delta["many_tokens"]) == ("step", "chunk") and delta["why"]
    assert "folder" in found["checkpoint"]
    assert main(["doctor"]) == 0 and "Rules" in capsys.readouterr().out


def test_bench_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "peers", lambda mixer: (None, {}))  # importing them takes longer than all else here
    assert main(["bench", "speed", "--mixers", "gated-deltanet", "--lengths", "64", "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {(row["mixer"], row["length"]) for row in rows} == {("gated-deltanet", 64)}
    assert all({"pass", "tokens_per_s", "peer", "ratio_to_peer", "ratio_to_floor"} <= row.keys() for row in rows)


def test_help_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 and "doctor" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["read", "--help"])
    assert end.value.code == 0 and "--continue" in capsys.readouterr().out


def test_interrupting_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", stop)
    assert main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "remanence: interrupted.\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nothing"], "invalid choice"),
        (["list", "--nothing"], "unrecognized arguments: --nothing"),
        (["ask"], "required"),
        (["list", "--kind", "mixr"], "did you mean mixer"),
        (["show", "gated-deltanat"], "did you mean gated-deltanet"),
        (["train", "quickstrt"], "did you mean quickstart"),
        (["eval", "babilonk"], "did you mean babilong"),
        (["eval", "gated-deltanet"], "benchmark 'gated-deltanet' is not known"),
        (["eval", "babilong", "--samples", "0"], "not a whole number >= 1"),
        (["eval", "babilong", "--lengths", "1q"], "not understood"),
        (["demo", "--tokens", "0"], "at least|>= 1"),
        (["demo", "--seed", "x"], "whole number"),
        (["bench", "speed", "--mixers", "gated-deltanat"], "did you mean gated-deltanet"),
        (["bench", "taste"], "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_words(refused: Callable[..., str], argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import re

    assert re.search(said, refused(*argv))
    assert not list(tmp_path.iterdir())


def test_texts_that_cannot_be_read(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "bad.txt").write_bytes(b"abc" * 100_000 + b"\xff\xfe")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "bad.gz").write_bytes(b"not gzip")
    before = tree(tmp_path)
    cases = {
        "bad.txt": "not UTF-8",
        "empty.txt": "is empty",
        ".": "is a folder",
        "none.txt": "does not exist",
        "blank.txt": "nothing was read",
    }
    for name, said in {**cases, "bad.gz": "gzip"}.items():
        assert said in refused("read", tmp_path / name, "--model", folder / "model", "--state", tmp_path / "s.safetensors")
    for name in ("bad.gz", "empty.txt", "none.txt"):
        refused("demo", "--text", tmp_path / name, "--model", folder / "model", "--out", tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_text_that_fails_late_leaves_the_state_as_it_was(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "bad.txt").write_bytes(b"abc " * 3000 + b"\xff")
    state = tmp_path / "s.safetensors"
    state.write_bytes((folder / "s.safetensors").read_bytes())
    before = tree(tmp_path)
    for flags in (["--continue"], []):
        refused("read", tmp_path / "bad.txt", "--model", folder / "model", "--state", state, *flags)
    assert tree(tmp_path) == before


def test_states_that_cannot_be_asked(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    good = (folder / "s.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(good[:-100])
    (tmp_path / "changed.safetensors").write_bytes(good[:-10] + bytes([good[-10] ^ 1]) + good[-9:])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.safetensors").touch()
    before = tree(tmp_path)
    cases = {
        "short": "not a safetensors",
        "changed": "changed after it was saved",
        "text": "not a safetensors",
        "empty": "not a safetensors",
    }
    for name, said in {**cases, "none": "does not exist"}.items():
        for command in (["ask", "Where?"], ["read", folder / "book.txt", "--continue"]):
            assert said in refused(*command, "--state", tmp_path / f"{name}.safetensors", "--model", folder / "model")
    assert "is a directory" in refused("ask", "Where?", "--state", tmp_path)
    assert tree(tmp_path) == before


def test_models_that_do_not_fit(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    state, before = folder / "s.safetensors", tree(folder)
    assert "other weights" in refused("ask", "Where?", "--state", state, "--model", folder / "other")
    assert "does not fit this model" in refused("ask", "Where?", "--state", state, "--model", folder / "wide")
    for command in (
        ["ask", "Where?", "--state", state],
        ["read", folder / "book.txt", "--state", tmp_path / "s"],
        ["eval", "babilong"],
        ["demo"],
    ):
        assert "does not exist" in refused(*command, "--model", tmp_path / "none")
        assert "config.json" in refused(*command, "--model", folder / "book.txt")
    (tmp_path / "model").mkdir()
    for file in (folder / "model").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "truncated" in refused("ask", "Where?", "--state", state, "--model", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert tree(folder) == before and not (tmp_path / "s").exists() and not Path("demo").exists()


def test_a_state_whose_model_has_gone_says_so(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    session = Session(rm.load(folder / "model"), ByteTokenizer()).read(TEXT)
    session.source = str(tmp_path / "gone")
    session.save(tmp_path / "s.safetensors")
    assert "which is not there; name the model's folder" in refused("ask", "Where?", "--state", tmp_path / "s.safetensors")


def test_empty_questions(folder: Path, refused: Callable[..., str]) -> None:
    for question in ("", "  \n"):
        assert "question is empty" in refused("ask", question, "--state", folder / "s.safetensors")


def test_places_that_cannot_be_written(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("x")
    before, model = tree(tmp_path), ["--model", folder / "model"]
    below = tmp_path / "file" / "below"
    for place in (below / "s.safetensors", below, tmp_path, "/dev/full", "/proc/none/s"):
        for command in (
            ["read", folder / "book.txt", *model, "--state", place],
            ["eval", "babilong", "--samples", 1, *model, "--json", place],
            ["eval", "babilong", "--samples", 1, *model, "--plot", place],
            ["bench", "speed", "--mixers", "gated-deltanet", "--lengths", 8, "--json", place],
        ):
            refused(*command)
    for command in (["demo", *model], ["train", "quickstart", "--steps", 1]):
        refused(*command, "--out", tmp_path / "file")
        refused(*command, "--out", below)
    assert tree(tmp_path) == before and not Path("/dev/full").is_file()


def test_a_full_disk_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "s.safetensors"
    state.write_bytes((folder / "s.safetensors").read_bytes())
    before = tree(tmp_path)

    def full() -> None:  # no file may grow beyond 512 bytes: the kernel's stand-in for a disk that fills up
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))

    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = process("read", folder / "book.txt", "--state", state, "--continue", preexec_fn=full, env=environment)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "s.safetensors could not be written" in done.stderr and "unchanged" in done.stderr
    assert tree(tmp_path) == before
