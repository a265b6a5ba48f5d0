import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import remanence as rm
from remanence.errors import RemanenceError, StateError, UsageError
from remanence.files import tensor_digest
from remanence.train import Curriculum, Piece, Stream, TrainConfig, as_pieces, cut, train
from remanence.train.checkpoint import heal, swap_folder
from remanence.train.loop import windows

CHILD = """
import random, sys, time
import numpy as np, torch
import remanence as rm
from remanence.train import Curriculum, Stream, TrainConfig, train
from remanence.train.loop import token_loss

out, pause = sys.argv[1], float(sys.argv[2])

class Data(Stream):
    curriculum = Curriculum([1, 2, 3], advance=0.5, window=4)

    def batch(self, seed, index):
        time.sleep(pause)
        return super().batch(seed, index)[: self.curriculum.size(seed, index)]

    def observe(self, metrics):
        self.curriculum.observe(metrics["coin"])
        return {"stage": self.curriculum.stage}

    def state(self):
        return self.curriculum.state()

    def restore(self, state):
        self.curriculum.restore(state)

def noisy_loss(model, piece, state):  # takes from all three generators, so that each must be resumed
    loss, state, _ = token_loss(model, piece, state)
    noise = torch.rand(()) + float(np.random.rand()) + random.random()
    return loss * noise, state, {"coin": torch.rand(())}

torch.manual_seed(0)
layers = [{"mixer": "gated-deltanet", "heads": 2}, {"mixer": "attention", "heads": 2, "window": 5}]
model = rm.Decoder(rm.ModelConfig(vocab=17, dim=8, layers=layers))
text = np.random.default_rng(0).integers(17, size=400)
data = Data([text[:150], text[150:]], rows=2, length=6, pieces=3)
config = TrainConfig(steps=30, lr=1e-2, warmup=3, accumulate=2, k2=1, checkpoint_every=4, eval_every=7, threads=1, device="cpu", seed=3)
evaluate = lambda model: {"loss": float(model(torch.arange(17)[None], targets=torch.arange(17)[None]).loss), "coin": float(torch.rand(()))}
train(model, data, config, out, evaluate, noisy_loss, quiet=True)
"""


def child(out: Path, pause: float) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(out), str(pause)], env=env, stderr=subprocess.PIPE, text=True)


def rows(out: Path, timing: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines if timing else [{k: v for k, v in row.items() if k not in ("elapsed", "tokens_per_s")} for row in lines]


def killed_at(process: subprocess.Popen, out: Path, steps: int) -> None:
    """SIGKILL once the run has written `steps` rows."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count('"loss"') >= steps:
            break
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_resume_after_sigkill_is_exact_to_the_bit(tmp_path):
    whole = child(tmp_path / "whole", 0.0)
    killed = child(tmp_path / "killed", 0.02)
    killed_at(killed, tmp_path / "killed", 14)
    assert 14 <= sum('"loss"' in line for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) < 30
    killed = child(tmp_path / "killed", 0.0)
    for process in (whole, killed):
        assert process.wait(300) == 0, process.stderr.read()
        process.stderr.close()
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert len({row["stage"] for row in rows(tmp_path / "whole") if "stage" in row}) > 1  # the curriculum did move
    for name in ("last", "best"):
        for file in ("model.safetensors", "optimizer.safetensors", "state.safetensors"):
            assert tensor_digest(load_file(tmp_path / "killed" / name / file)) == tensor_digest(load_file(tmp_path / "whole" / name / file))


def tiny(**hyper):
    torch.manual_seed(0)
    return rm.Decoder(rm.ModelConfig(vocab=11, dim=8, layers=[{"mixer": "gated-deltanet", "heads": 2}], **hyper))


class Copying:
    """The same sequence again and again: easily learnt."""

    def batch(self, seed, index):
        ids = torch.arange(11)[None].repeat(2, 1)
        return cut(ids[:, :-1], ids[:, 1:], 4)


def config(**changes):
    return TrainConfig(**({"steps": 12, "lr": 3e-2, "device": "cpu", "checkpoint_every": 0} | changes))


def test_metrics_last_and_best(tmp_path):
    values = iter([3.0, 1.0, 2.0])
    model = tiny()
    row = train(model, Copying(), config(eval_every=4), tmp_path, lambda model: {"loss": next(values)}, quiet=True)
    all_rows = rows(tmp_path, timing=True)
    updates, evals = [r for r in all_rows if "loss" in r], [r for r in all_rows if "eval/loss" in r]
    assert [r["step"] for r in updates] == list(range(1, 13)) and [r["step"] for r in evals] == [4, 8, 12]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "elapsed"} <= updates[0].keys()
    assert updates[-1]["loss"] < 0.8 * updates[0]["loss"] and updates[-1]["tokens"] == 12 * 20 and row["eval/loss"] == 2.0
    assert json.loads((tmp_path / "best" / "progress.json").read_text())["progress"]["step"] == 8
    assert rm.State is not None and (tmp_path / "environment.json").exists()
    assert TrainConfig.load(tmp_path / "config.json") == config(eval_every=4)
    loaded, ids = rm.load(tmp_path / "last"), torch.arange(11)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    before = (tmp_path / "last" / "progress.json").stat().st_mtime_ns
    assert train(tiny(), Copying(), config(eval_every=4), tmp_path, quiet=True)["loss"] == updates[-1]["loss"]  # done already
    assert (tmp_path / "last" / "progress.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("options", [{"replay": True}, {"recompute": True}, {"precision": "bf16"}])
def test_options_train_alike(tmp_path, options):
    plain, other = (train(tiny(), Copying(), config(**o), tmp_path / str(len(o)), quiet=True) for o in ({}, options))
    assert other["loss"] == pytest.approx(plain["loss"], rel=0.2 if "precision" in options else 1e-4)


def test_accumulation_equals_a_larger_batch(tmp_path):
    ids = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))

    class Halves:
        def batch(self, seed, index):
            part = ids[2 * (index % 2) : 2 * (index % 2) + 2]
            return part[:, :-1], part[:, 1:]

    class Whole:
        def batch(self, seed, index):
            return ids[:, :-1], ids[:, 1:]

    halves, whole = tiny(), tiny()
    one = train(halves, Halves(), config(steps=3, accumulate=2), tmp_path / "a", quiet=True)
    two = train(whole, Whole(), config(steps=3), tmp_path / "b", quiet=True)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5) and one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_carried_state_is_the_stream(tmp_path):
    """A carried state lets the loss see what came before the batch: its values are those of one long reading."""
    text = np.random.default_rng(0).integers(11, size=200)
    data, model, states = Stream([text], rows=2, length=7, pieces=2), tiny(), []

    def spy(model, piece, state):
        states.append(state)
        out = model(piece.ids, state, piece.span, targets=piece.targets)
        return out.loss * piece.count, out.state, {}

    train(model, data, config(steps=3, k2=0), tmp_path, loss=spy, quiet=True)
    assert states[0] is None and [s.tokens for s in states[1:]] == [7, 14, 21, 28, 35]
    saved = rm.State.load(tmp_path / "last" / "state.safetensors")
    assert saved.tokens == 42 and saved.header == model.header


def test_stream_is_contiguous_and_marks_documents():
    documents = [list(range(0, 30)), list(range(100, 123))]
    data = Stream(documents, rows=3, length=4, pieces=2)
    ring = documents[0] + documents[1]
    batches = [data.batch(5, index) for index in range(9)]
    for row in range(3):
        read = [int(t) for batch in batches for piece in batch for t in piece.ids[row]]
        start = ring.index(read[0])
        assert read == [ring[(start + i) % 53] for i in range(72)]
        aims = [int(t) for batch in batches for piece in batch for t in piece.targets[row]]
        assert aims == [-100 if t in (0, 100) else t for t in (ring[(start + i) % 53] for i in range(1, 73))]
    for piece in (piece for batch in batches for piece in batch):
        first = (piece.ids == 0) | (piece.ids == 100)
        assert (piece.span is None and not first.any()) or torch.equal(piece.span.reset, first)
    with pytest.raises(UsageError, match="need more than 60"):
        Stream(documents, rows=3, length=20)


def test_windows():
    assert windows(5, -1) == [range(0, 5)] and windows(5, 0) == [range(i, i + 1) for i in range(5)]
    assert windows(5, 1) == [range(0, 1), range(1, 3), range(3, 5)] and windows(2, 9) == [range(0, 2)]


def test_swap_survives_a_kill_at_any_moment(tmp_path):
    folder = tmp_path / "last"

    def write(text):
        return lambda part: (part / "x").write_text(text) and None

    swap_folder(folder, write("one"))
    swap_folder(folder, write("two"))
    assert (folder / "x").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["last"]
    for names, expected in (
        ({"last": "a", "last.part": "b"}, "a"),  # killed while writing
        ({"last": "a", "last.new": "b"}, "b"),  # written, not yet swapped
        ({"last.old": "a", "last.new": "b"}, "b"),  # between the two renames
        ({"last": "b", "last.old": "a"}, "b"),  # before the old one was removed
        ({"last.old": "a"}, "a"),
    ):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in names.items():
            (place / name).mkdir(parents=True)
            (place / name / "x").write_text(text)
        heal(place / "last")
        assert (place / "last" / "x").read_text() == expected and [p.name for p in place.iterdir()] == ["last"]

    def fail(part):
        raise OSError(28, "No space left on device")

    with pytest.raises(RemanenceError, match="No space left"):
        swap_folder(folder, fail)
    assert (folder / "x").read_text() == "two"


def test_refusals(tmp_path):
    train(tiny(), Copying(), config(steps=2), tmp_path, quiet=True)
    with pytest.raises(UsageError, match="lr=0.03 .now 0.01."):
        train(tiny(), Copying(), config(steps=2, lr=1e-2), tmp_path, quiet=True)
    with pytest.raises(UsageError, match="another configuration"):
        train(tiny(ffn=1.0), Copying(), config(steps=2), tmp_path, quiet=True)
    train(tiny(), Copying(), config(steps=3, lr=1e-2), tmp_path, resume=False, quiet=True)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    weights = tmp_path / "last" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="optimizer.safetensors was changed"):
        train(tiny(), Copying(), config(steps=4, lr=1e-2), tmp_path, quiet=True)
    with pytest.raises(UsageError, match="evaluate returned score"):
        train(tiny(), Copying(), config(), tmp_path / "b", lambda model: {"score": 0.0}, quiet=True)
    with pytest.raises(RemanenceError, match="loss is nan"):
        nan = lambda model, piece, state: (model(piece.ids).logits.sum() * float("nan"), model(piece.ids).state, {})  # noqa: E731
        train(tiny(), Copying(), config(), tmp_path / "c", loss=nan, quiet=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RemanenceError, match="cannot be made a folder"):
        train(tiny(), Copying(), config(), tmp_path / "file", quiet=True)
    for batch in ([], 3, [None]):
        with pytest.raises(UsageError, match="a batch is"):
            as_pieces(batch)

    class Nothing:
        def batch(self, seed, index):
            return [Piece(torch.zeros(1, 3, dtype=torch.long))]

    with pytest.raises(UsageError, match="no target"):
        train(tiny(), Nothing(), config(), tmp_path / "d", quiet=True)


def test_config(tmp_path):
    full = TrainConfig(steps=7, schedule="wsd", k2=3, replay=True)
    full.save(tmp_path / "c.json")
    assert TrainConfig.load(tmp_path / "c.json") == full == TrainConfig.from_dict(full.to_dict())
    wrongs = [{"steps": 0}, {"lr": -1.0}, {"lr": float("nan")}, {"k2": -2}, {"clip": -1.0}, {"floor": 2.0}, {"seed": -1}, {"warmup": 1.5}]
    for wrong in [*wrongs, {"schedule": "cos"}, {"precision": "fp8"}, {"recompute": True, "replay": True}]:
        with pytest.raises(UsageError):
            TrainConfig(**wrong)
    with pytest.raises(UsageError, match="did you mean steps"):
        TrainConfig.from_dict({"step": 3})
    with pytest.raises(UsageError, match="device is 'gpu7'"):
        _ = TrainConfig(device="gpu7").torch_device
    assert not TrainConfig(device="cpu").bf16 and TrainConfig(device="cpu", precision="bf16").bf16


def test_evaluation_leaves_no_trace(tmp_path):
    """Evaluating more often changes neither the losses nor the mode."""

    def noisy(model, piece, state):
        out = model(piece.ids, state, piece.span, targets=piece.targets)
        assert model.training
        return out.loss * piece.count * (1 + torch.rand(())), out.state, {}

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        return {"loss": float(torch.rand(()))}

    losses = []
    for every in (1, 5):
        train(tiny(), Copying(), config(eval_every=every), tmp_path / str(every), evaluate, noisy, quiet=True)
        losses.append([row["loss"] for row in rows(tmp_path / str(every)) if "loss" in row])
    assert losses[0] == losses[1]


def test_curriculum_state_in_checkpoint(tmp_path):
    class Data(Copying):
        curriculum = Curriculum([1, 2], window=1, advance=0.1)

        def observe(self, metrics):
            self.curriculum.observe(1.0)

        def state(self):
            return self.curriculum.state()

        def restore(self, state):
            self.curriculum.restore(state)

    train(tiny(), Data(), config(steps=1), tmp_path, quiet=True)
    fresh = Data()
    fresh.curriculum = Curriculum([1, 2], window=1, advance=0.1)
    train(tiny(), fresh, config(steps=2), tmp_path, quiet=True)
    assert fresh.curriculum.stage == 1 and fresh.curriculum.steps == 1


def test_state_of_another_model_is_refused():
    with pytest.raises(StateError):
        tiny(ffn=1.0)(torch.zeros(1, 1, dtype=torch.long), tiny()(torch.zeros(1, 1, dtype=torch.long)).state)
