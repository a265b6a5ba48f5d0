"""Accuracy by length, its file, the published figures, the figures and the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import remanence as rm
from helpers import assert_states_close
from remanence.errors import FileError, UnknownName, UsageError
from remanence.evaluate import longrange, plots, published, report
from remanence.evaluate.longrange import by_distance, distance_bucket, evaluate, evaluate_to_file, parse_lengths, short, stream, wilson
from remanence.session import Answer
from remanence.tasks import Example
from remanence.tasks.babi import solve
from remanence.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
PNG = b"\x89PNG\r\n"


def tiny(seed: int = 0) -> rm.Model:
    torch.manual_seed(seed)
    layers = [{"mixer": "gated-deltanet", "heads": 2}, {"mixer": "attention", "heads": 2, "window": 8}]
    return rm.Decoder(rm.ModelConfig(vocab=259, dim=16, layers=layers, ffn=1.0)).eval()


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers by rule from what `stream` was given: it tells what evaluation shows a model, and scores what it says."""

    class Read:
        nbytes = 800

        def __init__(self, examples: list[Example], window: int | None):
            starts = [0 if window is None else max(0, example.length - window) for example in examples]
            self.texts = [TOKENIZER.decode(example.read(start, example.length).tolist()) for example, start in zip(examples, starts)]

    def ask(model: object, tokenizer: object, state: Read, questions: list[str], max_new: int) -> list[Answer]:
        answers = []
        for text, question in zip(state.texts, questions, strict=True):
            try:
                said = solve(text, question)
            except UsageError:
                said = "nowhere"
            answers.append(Answer(said, torch.zeros(1), ()))
        return answers

    monkeypatch.setattr(longrange, "stream", lambda model, examples, progress, window: Read(examples, window))
    monkeypatch.setattr(longrange, "answer", ask)


def test_lengths() -> None:
    assert parse_lengths("0, 1k,4K,1M,1.5k,300") == [0, 1000, 4000, 1_000_000, 1500, 300]
    for bad in ("", "1k,", "-1", "1.5", "k", "1g", "1e3", "nan"):
        with pytest.raises(UsageError, match="not understood"):
            parse_lengths(bad)
    assert [short(n) for n in (0, 512, 1000, 128_000, 1_000_000)] == ["0", "512", "1k", "128k", "1M"]


def test_wilson() -> None:
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)  # Wilson 1927, by hand
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and wilson(0, 0) == (0, 1)


def test_distances_are_gathered() -> None:
    assert [distance_bucket(d) for d in (0, 511, 512, 1999, 2000, 8000)] == [
        (0, 512), (0, 512), (512, 2000), (512, 2000), (2000, 8000), (8000, 32_000),
    ]  # fmt: skip
    rows = by_distance([(600, True), (10, False), (700, False), (20, True)])
    assert [(row["low"], row["n"], row["correct"], row["accuracy"]) for row in rows] == [(0, 2, 1, 0.5), (512, 2, 1, 0.5)]


def test_streaming_together_is_streaming_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longrange, "PIECE", 16)
    model, rng = tiny(), np.random.default_rng(0)
    contexts = [rng.integers(0, 256, n) for n in (50, 7, 33, 16)]
    counts: list[int] = []
    together = stream(model, contexts, counts.append)
    assert sum(counts) == 106 and together is not None
    for row, ids in enumerate(contexts):
        with torch.no_grad():
            alone = model(torch.from_numpy(ids)[None]).state
        assert_states_close(f"row {row}", together.rows([row]), alone, 1e-5)
    assert_states_close("window", stream(model, contexts, window=20), stream(model, [ids[-20:] for ids in contexts]), 1e-6)
    assert stream(model, [np.empty(0, np.int64)]) is None


def test_rows(oracle: None) -> None:
    rows = evaluate(tiny(), TOKENIZER, "babilong", [0, 2000], samples=12, batch=5, window=300)
    keys = {"task", "length", "accuracy", "n", "low", "high", "correct", "distance_mean", "tokens_per_s", "seconds_per_1k"}
    assert all(keys | {"state_bytes", "peak_rss_mb", "rss", "memory", "seed"} <= row.keys() for row in rows)
    assert [(row["length"], row["memory"]) for row in rows] == [(0, "on"), (0, "off"), (2000, "on"), (2000, "off")]
    facts, _, whole, window = rows
    assert facts["accuracy"] == whole["accuracy"] == 1  # the rule answers whatever was read whole
    assert 0 < window["accuracy"] < 0.7  # and what happens to stand in the last 300 tokens
    for row in rows:
        assert row["n"] == 12 == sum(part["n"] for part in row["by_distance"])
        assert row["low"] <= row["accuracy"] <= row["high"] and row["peak_rss_mb"] > 10
    assert 300 < whole["distance_mean"] < 2000


def test_examples_do_not_depend_on_the_batch() -> None:
    one, other = (evaluate(tiny(), TOKENIZER, "babilong", [300], samples=5, batch=batch, max_new=2) for batch in (2, 5))
    assert [row["distance_mean"] for row in one] == [row["distance_mean"] for row in other]
    assert [row["correct"] for row in one] == [row["correct"] for row in other]


def test_other_tasks_and_no_control() -> None:
    rows = evaluate(tiny(), TOKENIZER, "passkey", [600], samples=2, window=0, max_new=2)
    assert [(row["task"], row["qa"], row["memory"]) for row in rows] == [("passkey", None, "on")]
    with pytest.raises(UsageError, match="no questions in words"):
        evaluate(tiny(), TOKENIZER, "assoc-retrieval", [64], samples=1)


def test_a_file_is_continued(tmp_path: Path, oracle: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file, model = tmp_path / "r.json", tiny()
    first = evaluate_to_file(file, model, TOKENIZER, "babilong", [0], samples=3)
    seen: list[int] = []
    plain = longrange._one
    monkeypatch.setattr(longrange, "_one", lambda *args: seen.append(args[3]) or plain(*args))
    rows = evaluate_to_file(file, model, TOKENIZER, "babilong", [1000, 0], samples=3)
    assert seen == [1000, 1000] and rows[:2] == first and [row["length"] for row in rows] == [0, 0, 1000, 1000]
    content = json.loads(file.read_text())
    assert content["rows"] == rows and content["meta"]["settings"]["samples"] == 3 and content["meta"]["environment"]["torch"]
    with pytest.raises(UsageError, match="other settings .*seed 0 and not 1"):
        evaluate_to_file(file, model, TOKENIZER, "babilong", [0], samples=3, seed=1)
    with pytest.raises(UsageError, match="other settings .*model"):
        evaluate_to_file(file, tiny(1), TOKENIZER, "babilong", [0], samples=3)
    file.write_text("[]")
    with pytest.raises(UsageError, match="not a file of evaluation results"):
        evaluate_to_file(file, model, TOKENIZER, "babilong", [0], samples=3)


def test_a_killed_evaluation_keeps_what_was_finished(tmp_path: Path, oracle: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = longrange._one

    def fails(*args: object) -> object:
        if args[3] == 1000:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(longrange, "_one", fails)
    with pytest.raises(KeyboardInterrupt):
        evaluate_to_file(tmp_path / "r.json", tiny(), TOKENIZER, "babilong", [0, 1000], samples=2)
    assert [row["length"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == [0, 0]


def test_published_figures() -> None:
    curves = {curve.model.split()[0]: curve for curve in published.curves("babilong", "qa1")}
    assert (1_000_000, 99) in curves["ARMT"].points and curves["Mamba"].points[0] == (128_000, 100)
    assert all(curve.source and list(curve.points) == sorted(curve.points) for curve in curves.values())
    assert published.curves("babilong", "qa2") == []
    assert {figure.source for figure in published.published("babilong")} and published.RANGES
    with pytest.raises(UnknownName):
        published.published("babilonk")


def test_figures_and_report(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rows = [
        {"length": length, "memory": memory, "accuracy": 0.5, "low": 0.4, "high": 0.6}
        for length in (0, 1000, 128_000)
        for memory in ("on", "off")
    ]
    on, off = by_distance([(10, True), (3000, True)]), by_distance([(10, True), (3000, False)])
    plots.accuracy_by_length(rows, tmp_path / "length.png", published.curves(), 1 / 6)
    plots.accuracy_by_distance(on, off, tmp_path / "distance.png", 1 / 6)
    plots.cost_by_position([{"tokens": n, "seconds_per_1k": 0.1, "state_bytes": 2048} for n in (10, 20)], tmp_path / "cost.png")
    plots.weights([("one", 0.0, "other"), ("two", 0.0, "answer")], tmp_path / "weights.png", "title", "weight")
    images = sorted(tmp_path.glob("*.png"))
    assert len(images) == 4 and all(image.read_bytes().startswith(PNG) for image in images)
    assert not recwarn.list
    sections = [report.Section("Lengths <&>", ["text"], [["a", "b"], [1, 2]], images[0], "caption")]
    report.write_report(tmp_path / "r.html", "Title", "Lead", sections)
    page = (tmp_path / "r.html").read_text()
    assert "Lengths &lt;&amp;&gt;" in page and "<td>1</td><td>2</td>" in page and "data:image/png;base64," in page
    assert "http" not in page  # nothing is fetched
    with pytest.raises(FileError):
        plots.weights([("one", 1.0, "other")], tmp_path, "title", "weight")
