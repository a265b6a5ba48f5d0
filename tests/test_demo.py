"""The demonstration: the stream it makes, the account it keeps, and what it writes."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import remanence as rm
from remanence.demo import LONGEST, QUESTIONS, Noise, demo, facts, run
from remanence.errors import FileError, UsageError
from remanence.session import PIECE
from remanence.tasks.babi import ROOMS, solve
from remanence.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
TOKENS = 12_000


def tiny(**hyper: object) -> rm.Model:
    torch.manual_seed(0)
    layers = [{"mixer": "gated-deltanet", "heads": 2, **hyper}, {"mixer": "attention", "heads": 2, "window": 8}]
    return rm.Decoder(rm.ModelConfig(vocab=259, dim=16, layers=layers, ffn=1.0)).eval()


def recorded(model: rm.Model) -> list[torch.Tensor]:
    """The ids of every call that asks for no logits: what is streamed, and the windows of the control."""
    calls: list[torch.Tensor] = []
    hook = lambda _, args, kwargs: calls.append(args[0]) if kwargs.get("logits") == "none" else None  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def test_what_is_asked_follows_from_what_was_read() -> None:
    model = tiny()
    calls = recorded(model)
    result = run(model, TOKENIZER, tokens=TOKENS, seed=3)
    read, windows, stops = [], [], []
    for ids in calls:  # a question ends each part: the call after it is the control's window
        if len(stops) < QUESTIONS and sum(map(len, read)) >= TOKENS * (len(stops) + 1) // QUESTIONS:
            stops.append(sum(map(len, read)))
            windows.append(ids[0])
        else:
            read.append(ids[0])
    whole = torch.cat(read)
    assert len(whole) == result.tokens and stops == sorted({one.position for one in result.asked})
    for stop, window in zip(stops, windows, strict=True):
        assert torch.equal(window, whole[max(0, stop - 512) : stop])
    for fact in result.planted:
        assert TOKENIZER.decode(whole[fact.position : fact.position + fact.length].tolist()) == " " + fact.text
    assert len(result.asked) > QUESTIONS and len(result.planted) > 8
    for one in result.asked:
        assert solve(TOKENIZER.decode(whole[: one.position].tolist()), f"Where is {one.actor}?") == one.room
        assert one.distance == one.position - one.fact.position > 0
    assert max(map(len, read)) <= PIECE and [point["tokens"] for point in result.points] == sorted({p["tokens"] for p in result.points})
    assert len({point["state_bytes"] for point in result.points}) == 1


def test_the_same_seed_gives_the_same_run() -> None:
    one, same, other = (run(tiny(), TOKENIZER, tokens=3000, seed=seed) for seed in (0, 0, 1))
    assert one.asked == same.asked and one.planted == same.planted != other.planted


def test_facts_move_and_their_distances_vary() -> None:
    import random

    drawn = list(islice(facts(random.Random(0), 100_000), 400))
    where: dict[str, str] = {}
    for _, actor, room, text in drawn:
        assert room != where.get(actor) and room in ROOMS and text.startswith(actor) and text.endswith(f"the {room}.")
        where[actor] = room
    gaps = np.array([gap for gap, *_ in drawn])
    assert gaps.min() >= 15 and gaps.max() <= 12_500
    assert (gaps < 100).mean() > 0.2 and (gaps > 3000).mean() > 0.15  # log-uniform: near and far alike


def test_a_text_is_read_over_and_over(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("One. Two. This is a sentence of some length, as books have. Mary went to the kitchen.\n\nA last one, without a stop")
    noise = Noise(TOKENIZER, file)
    texts = [TOKENIZER.decode(ids) for ids in islice(noise, 5)]
    assert texts[:2] == [" One. Two. This is a sentence of some length, as books have.", " A last one, without a stop"]
    assert texts[2:4] == texts[:2] and noise.laps == 2 and noise.left_out == 1


@pytest.mark.parametrize(
    "text", ["日本語の文章です。" * 600, "word " * 3000, "x", "Ünï\n\n\n\ncödé 😀"], ids=["cjk", "no stops", "short", "emoji"]
)
def test_any_text_will_do(tmp_path: Path, text: str) -> None:
    file = tmp_path / "t.txt"
    file.write_text(text, encoding="utf-8")
    sizes = [len(TOKENIZER.decode(ids)) for ids in islice(Noise(TOKENIZER, file), 50)]
    assert len(sizes) == 50 and max(sizes) <= LONGEST + 1
    result = run(tiny(), TOKENIZER, file, tokens=1500)
    assert result.tokens >= 1500 and result.asked


def test_a_text_without_other_sentences_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Mary went to the kitchen.")
    with pytest.raises(UsageError, match="no text but moves"):
        run(tiny(), TOKENIZER, tmp_path / "t.txt", tokens=500)


def test_facts_get_their_weight_across_calls() -> None:
    model = tiny(write="hard", forget=False)
    calls = recorded(model)
    result = run(model, TOKENIZER, tokens=TOKENS)
    whole = torch.cat([ids[0] for ids in calls if len(ids[0]) != 512])
    first = whole[: TOKENS // QUESTIONS]
    block = model.blocks[0]
    with torch.no_grad():
        gates = block.mixer.to_beta(block.norm(model.embed(first[None]))).clamp(0, 1).amax(-1)[0]
    early = [fact for fact in result.planted if fact.position + fact.length < len(first)]
    want = [float(gates[fact.position : fact.position + fact.length].max()) for fact in early]
    assert early and [fact.weight or 0.0 for fact in early] == pytest.approx(want, abs=1e-5)
    assert result.written is not None and 0 < result.written <= 1
    assert not block.mixer.to_beta._forward_hooks


def test_what_was_attended_to_is_of_the_last_answers() -> None:
    result = run(tiny(write="hard", forget=False), TOKENIZER, tokens=3000)
    assert result.attended is not None
    one, rows = result.attended
    assert one in result.asked and one.position == result.asked[-1].position
    shares = [share for _, share, _ in rows]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-6
    assert {role for _, _, role in rows} <= {"answer", "asked", "other", "book"}
    assert run(tiny(), TOKENIZER, tokens=3000).attended is None


@pytest.mark.parametrize("traced", [True, False])
def test_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str], traced: bool) -> None:
    tiny(**({"write": "hard", "forget": False} if traced else {})).save(tmp_path / "model")
    TOKENIZER.save(tmp_path / "model")
    demo(tokens=3000, out=tmp_path / "out", model=tmp_path / "model")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["memory"] for row in found["rows"]} == {"on", "off"} and found["meta"]["tokens"] >= 3000
    assert len(found["asked"]) == sum(row["n"] for row in found["rows"] if row["memory"] == "on")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == (3 if traced else 2)
    assert ("no memory whose reads can be traced" in page) != traced
    assert (found["attended"] is not None) == traced
    printed = capsys.readouterr().out
    assert printed.count("remanence ") == 3 and "last 512" in printed


def test_bad_places_show_before_the_work(tmp_path: Path) -> None:
    tiny().save(tmp_path / "model")
    TOKENIZER.save(tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="is a file"):
        demo(out=tmp_path / "file", model=tmp_path / "model")
    with pytest.raises(FileError, match="could not be written"):
        demo(out=tmp_path / "file" / "out", model=tmp_path / "model")
    with pytest.raises(UsageError, match="does not exist"):
        demo(text=tmp_path / "none.txt", out=tmp_path / "out", model=tmp_path / "model")
    assert not (tmp_path / "out").exists()
