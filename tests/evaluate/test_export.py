"""Tasks as JSON lines: the layouts' fields and places, the examples that evaluation asks, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import remanence as rm
from remanence.cli import main
from remanence.errors import UnknownName, UsageError
from remanence.evaluate.export import export
from remanence.evaluate.longrange import samples_of
from remanence.tasks.base import Example
from remanence.tokenizers import BPETokenizer, ByteTokenizer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_babilong_has_the_official_fields_and_our_examples(tmp_path: Path) -> None:
    paths = export("babilong", "babilong", [0, 1000], 3, tmp_path, seed=2, qa="qa1,qa3")
    names = ["qa1/0k", "qa1/1k", "qa3/0k", "qa3/1k"]
    assert [str(path.relative_to(tmp_path)) for path in paths] == [f"data/{name}.jsonl" for name in names]
    task, tokenizer = rm.task("babilong"), ByteTokenizer()
    rows = lines(paths[1])
    assert [set(row) for row in rows] == [{"input", "question", "target"}] * 3
    for row, example in zip(rows, samples_of(task, tokenizer, 1000, 3, 2, "qa1"), strict=True):
        assert (row["input"], row["question"], row["target"]) == (example.text(), example.question, example.answer)
        assert len(tokenizer.encode(row["input"])) == 1000 and task.oracle(example) == row["target"]


def test_ruler_has_the_official_fields(tmp_path: Path) -> None:
    (path,) = export("passkey", "ruler", [600], 2, tmp_path)
    assert path == tmp_path / "600" / "data" / "passkey" / "validation.jsonl"
    rows = lines(path)
    assert [set(row) for row in rows] == [{"index", "input", "outputs", "length", "answer_prefix"}] * 2
    assert [row["index"] for row in rows] == [0, 1]
    for row in rows:
        assert row["outputs"][0] in row["input"] and row["length"] == len(ByteTokenizer().encode(row["input"] + row["answer_prefix"]))


def test_rulers_tasks_keep_their_names(tmp_path: Path) -> None:
    (path,) = export("ruler", "ruler", [600], 1, tmp_path, options={"task": "niah-multikey-1"})
    assert path == tmp_path / "600" / "data" / "niah_multikey_1" / "validation.jsonl"


def test_a_task_of_several_answers_and_a_prefix(tmp_path: Path) -> None:
    class Several(rm.task("passkey").__class__):
        slug = "several"
        tokens_to_generate = 128

        def sample(self, seed: int = 0, n: int = 8, length: int = 0, tokenizer: Any = None) -> list[Example]:
            examples = super().sample(seed, n, length, tokenizer)
            for example in examples:
                example.__dict__.update({"answers": ("1", "22"), "answer_prefix": " The pass key is"})
            return examples

    (path,) = export(Several(), "ruler", [400], 1, tmp_path)
    (row,) = lines(path)
    assert row["outputs"] == ["1", "22"] and row["answer_prefix"] == " The pass key is" and row["input"].endswith("What is the pass key?")
    assert row["length"] == len(ByteTokenizer().encode(row["input"] + row["answer_prefix"])) + 128


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(["Mary went to the garden. It was the best of times. " * 40], 400)
    (path,) = export("babilong", "babilong", [300], 1, tmp_path, tokenizer=tokenizer)
    assert len(lines(path)[0]["input"]) > 320


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mqar gives symbols; layout 'ruler' is for tasks with a text"):
        export("mqar", "ruler", [64], 1, tmp_path)
    with pytest.raises(UnknownName, match="did you mean babilong"):
        export("babilonk", "ruler", [64], 1, tmp_path)
    with pytest.raises(UnknownName, match="layout 'rular'.*did you mean ruler"):
        export("babilong", "rular", [64], 1, tmp_path)
    with pytest.raises(UsageError, match="5 tokens"):
        export("babilong", "babilong", [1000, 5], 1, tmp_path)
    with pytest.raises(UsageError, match="haystack"):
        export("babilong", "babilong", [1000], 1, tmp_path, options={"haystack": " "})
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "babilong", "--layout", "ruler", "--lengths", "0", "--n", "2", "--out", str(tmp_path / "x")]
    assert main([*words, "--qa", "qa2"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "x" / "0" / "data" / "babilong_qa2" / "validation.jsonl" and len(lines(path)) == 2
    (tmp_path / "file").touch()
    for more, said in (
        (["--layout", "x"], "invalid choice"), (["--tokenizer", str(tmp_path)], "has no tokenizer"), (["--lengths", "3"], "3 tokens"),
        (["--out", str(tmp_path / "file" / "x")], "could not be written"), (["--option", "pears=1"], "taken by none"),
    ):  # fmt: skip
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
