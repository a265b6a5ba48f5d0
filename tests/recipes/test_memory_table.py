"""The table of memories: what its streams say is true, weights are carried over, a run is resumed, and nonsense is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from remanence.errors import UnknownName, UsageError
from remanence.recipes import memory_table as table
from remanence.tasks.base import IGNORE


def test_every_question_of_a_stream_has_the_last_value_written() -> None:
    ids, targets = table.events(np.random.default_rng(0), rows=16)
    assert ids.shape == targets.shape == (16, table.LENGTH)
    first_key, first_value, first_noise = table.BYTES, table.BYTES + table.KEYS, table.VOCAB - table.NOISE
    asked = changed = 0
    for row, wanted in zip(ids.reshape(16, -1, 2), targets.reshape(16, -1, 2)):
        known: dict[int, int] = {}
        for (key, value), target in zip(row, wanted):
            assert target[1] == IGNORE
            if key >= first_noise:
                assert value >= first_noise and target[0] == IGNORE
                continue
            assert first_key <= key < first_value <= value < first_noise
            if target[0] != IGNORE:
                asked += 1
                assert target[0] == value == known[key]
            changed += target[0] == IGNORE and key in known
            known[key] = value
    assert asked > 500 and changed > 50


@pytest.mark.parametrize(("keys", "writes", "gap"), [(1, 1, 0), (4, 3, 32), (16, 1, 100)])
def test_the_facts_of_a_context_and_their_history(keys: int, writes: int, gap: int) -> None:
    (told, asked), wanted, earlier = table.facts(np.random.default_rng(1), 8, keys, writes, gap)
    assert told.shape[1] == -(-keys * writes * 2 // 32) * 32 + gap and asked.shape == (8, 1)
    for row, key, answer, before in zip(told, asked[:, 0], wanted, earlier):
        values = [value for other, value in row[: keys * writes * 2].reshape(-1, 2) if other == key]
        assert len(values) == writes and values[-1] == answer and values[:-1] == before.tolist()
        assert (row[keys * writes * 2 :] >= table.VOCAB - table.NOISE).all()


def test_verdicts_follow_the_figures() -> None:
    def rows(name: str, right: float, bits: float) -> list[dict]:
        pairs = [
            {"memory": name, "task": "assoc-retrieval", "pairs": p, "gap": table.SEGMENT, "n": 256, "accuracy": right} for p in table.PAIRS
        ]
        stretches = [bits, bits + 0.1, bits - 0.1]
        return [*pairs, {"memory": name, "task": "books", "from": 1, "to": 9, "bits_per_byte": bits, "stretches": stretches}]

    said = table.verdicts([*rows("armt", 0.9, 2.0), *rows("rmt", 0.2, 2.5), *rows("transformer-xl", 0.5, 2.1)])
    assert len(said) == 2 and ": confirmed. 90.0% against 20.0%" in said[0] and "the other way round. 2.500 against 2.100" in said[1]
    assert "no difference to be seen" in table.verdicts([*rows("armt", 0.9, 2.0), *rows("rmt", 0.9, 2.0)])[0]
    lost = rows("rmt", 0.2, 2.5)
    table.whole(lost).update(bits_per_byte=None, stretches=[None, None])
    assert "rmt diverged on books" in table.verdicts([*lost, *rows("transformer-xl", 0.5, 2.1)])[0]


def test_guesses_at_random_are_right_as_often_as_chance_says() -> None:
    class Guess(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, ids, state=None, logits="all"):  # noqa: ANN001, ANN202
            return type("Out", (), {"state": None, "logits": torch.randn(*ids.shape, table.VOCAB)})()

    torch.manual_seed(0)
    (told, asked), wanted, _ = table.facts(np.random.default_rng(2), 4096, 2)
    got = table.answers(Guess(), told[:, :4], asked)  # type: ignore[arg-type]
    assert abs((got == wanted).mean() - table.CHANCE) < 4 * np.sqrt(table.CHANCE / 4096)


@pytest.mark.parametrize("name", list(table.SETUPS))
def test_every_memory_is_built_around_the_backbone(name: str) -> None:
    torch.manual_seed(0)
    backbone = table._decoder([{"mixer": "attention", "times": table.LAYERS}])
    before = {key: t.clone() for key, t in backbone.state_dict().items()}
    model = table.SETUPS[name].build(backbone)
    assert table._share(model, backbone) > 0.5
    out = model(torch.randint(table.VOCAB, (2, 40)))
    assert out.logits.shape == (2, 40, table.VOCAB) and bool(out.logits.isfinite().all())
    assert all(torch.equal(t, before[key]) for key, t in backbone.state_dict().items())  # its own copy


def test_without_a_memory_the_model_is_the_backbone_on_a_segment() -> None:
    torch.manual_seed(0)
    backbone = table._decoder([{"mixer": "attention", "times": table.LAYERS}])
    ids = torch.randint(table.VOCAB, (2, 2 * table.SEGMENT))
    got = table.SETUPS["no memory"].build(backbone)(ids).logits
    torch.testing.assert_close(got[:, table.SEGMENT :], backbone(ids[:, table.SEGMENT :]).logits)


def test_a_run_is_written_resumed_and_complete(tmp_path) -> None:  # noqa: ANN001
    table.recipe(memory="armt", fast=True).start(tmp_path, quiet=True)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert {row["memory"] for row in saved["rows"]} == {"armt"}
    assert {row["task"] for row in saved["rows"]} == {"assoc-retrieval", "fact-update", "passkey", "streams", "books", "cost"}
    text = (tmp_path / "armt" / "rows.json").read_text()
    table.recipe(memory="armt", fast=True).start(tmp_path, quiet=True)
    assert (tmp_path / "armt" / "rows.json").read_text() == text


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UnknownName, match="memory of the table"):
        table.recipe(memory="amrt")
    with pytest.raises(UsageError, match="once"):
        table.recipe(memory="armt,armt")
    with pytest.raises(UsageError, match="reads the shipped books"):
        table.recipe(data="books")


def test_no_question_of_a_lesson_is_answered_in_its_segment() -> None:
    for segments in (0, 2):
        ids, targets = table.lessons(np.random.default_rng(0), rows=6, pairs=4, segments=segments)
        start = (1 + segments) * table.SEGMENT
        assert ids.shape == (6, start + 8) and (targets != IGNORE).sum() == 24 and (targets[:, :start] == IGNORE).all()
        for row, wanted in zip(ids, targets):
            told = dict(row[:8].reshape(4, 2).tolist())
            assert [told[key] for key in row[start::2]] == row[start + 1 :: 2].tolist() == wanted[start::2].tolist()


def test_what_is_taught_grows() -> None:
    data = table.Recall(512, steps=100)
    pieces = [data.batch(0, index) for index in range(100)]
    streams = [piece.ids.shape for index, piece in enumerate(pieces) if index % 4 == 3 and index >= 30]
    assert set(streams[:8]) == {(8, 64), (4, 128)} and set(streams) == {(8, 64), (4, 128), (2, 256)}
    lesson = [piece for index, piece in enumerate(pieces) if index % 4 != 3 or index < 30]
    pairs = [int((piece.targets[0] != IGNORE).sum()) for piece in lesson]
    noise = [(piece.ids.shape[1] - 2 * n) // table.SEGMENT - 1 for piece, n in zip(lesson, pairs)]
    assert set(pairs[:15]) == {1} and set(pairs[50:]) == {1, 2, 4, 8, 16}
    assert set(noise[:30]) == {0} and set(noise[50:]) == {0, 1, 2}


def test_the_backbone_reads_books_and_streams_in_turn() -> None:
    data = table.Basics(rows=2, steps=30)
    pieces = [data.batch(0, index) for index in range(30)]
    assert all(int(piece.ids.max()) < table.BYTES and piece.ids.shape == (2, table.LENGTH) for piece in pieces[::2])
    assert [piece.ids.shape[1] for piece in pieces[1:10:2]] == [8, 16, 32, 32, 64]
    assert all(piece.ids.shape == (2, table.LENGTH) and int(piece.ids.min()) >= table.BYTES for piece in pieces[11::2])
