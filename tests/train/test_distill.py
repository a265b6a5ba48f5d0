"""Distillation: its formula against torch's, its states in the training loop, and the BabyHGRN model."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence import Decoder, ModelConfig, Span
from remanence.errors import ShapeError, UnknownName, UsageError
from remanence.mixers.hgrn import LowerBound
from remanence.train import Piece, Stream, TrainConfig, token_loss, train
from remanence.train.distill import distill, soft_loss

VOCAB = 20


def decoder(seed: int, layers: str = "mingru", dim: int = 16, vocab: int = VOCAB) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(ModelConfig(vocab=vocab, dim=dim, layers=layers, ffn=1))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def pieces() -> tuple[Piece, Piece]:
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCAB, (2, 30), generator=random)
    targets = ids.roll(-1, 1).masked_fill(torch.rand(2, 30, generator=random) < 0.3, -100)
    return Piece(ids[:, :12], targets[:, :12]), Piece(ids[:, 12:], targets[:, 12:])


@pytest.mark.parametrize("average", ["logits", "losses"])
def test_parity_with_torchs_losses(average: str) -> None:
    """alpha CE + (1 - alpha) T^2 KL as BabyLlama's trainer has it, on the positions that have a target."""
    student, teachers, piece = decoder(0), [decoder(1), decoder(2, "gla")], pieces()[0]
    value, _, metrics = distill(student, teachers, alpha=0.3, temperature=2.5, average=average)(student, piece, None)
    wanted, T = piece.targets != -100, 2.5
    own = student(piece.ids).logits[wanted]
    read = [teacher(piece.ids).logits[wanted].detach() for teacher in teachers]
    ce = F.cross_entropy(own, piece.targets[wanted])
    kl = torch.nn.KLDivLoss(reduction="batchmean")
    sources = [torch.stack(read).mean(0)] if average == "logits" else read
    soft = torch.stack([kl(F.log_softmax(own / T, -1), F.softmax(logits / T, -1)) for logits in sources]).mean() * T**2
    assert_parity("babyhgrn", f"torch cross_entropy and KLDivLoss ({average})", value / piece.count, 0.3 * ce + 0.7 * soft)
    assert metrics["ce"].item() == pytest.approx(ce.item(), rel=1e-5) and metrics["soft"].item() == pytest.approx(soft.item(), rel=1e-5)
    grads = [torch.autograd.grad(x, student.embedding.weight, retain_graph=True)[0] for x in (value / piece.count, 0.3 * ce + 0.7 * soft)]
    assert_close("gradient", *grads, 1e-5)


def test_a_teacher_that_agrees_teaches_nothing() -> None:
    student, copy = decoder(0), decoder(0)
    piece = pieces()[0]
    value, _, metrics = distill(student, [copy])(student, piece, None)
    plain, _, _ = token_loss(student, piece, None)
    assert abs(metrics["soft"].item()) < 1e-6
    assert value.item() == pytest.approx(0.5 * plain.item(), rel=1e-5)
    assert distill(student, [decoder(1)], alpha=1.0)(student, piece, None)[0].item() == pytest.approx(plain.item(), rel=1e-5)
    one = torch.randn(3, 7)
    assert_close("two equal teachers", soft_loss(one.flip(0), [one, one]), soft_loss(one.flip(0), [one]), 1e-6)


def test_states_of_student_and_teachers_are_carried() -> None:
    student, teachers, (first, second) = decoder(0), [decoder(1), decoder(2, "gated-deltanet")], pieces()
    loss = distill(student, teachers)
    whole = Piece(torch.cat([first.ids, second.ids], 1), torch.cat([first.targets, second.targets], 1))
    a, state, _ = loss(student, first, None)
    b, end, _ = loss(student, second, state)
    want, last, _ = loss(student, whole, None)
    assert (a + b).item() == pytest.approx(want.item(), rel=1e-5)
    assert [s.header for s in (end.student, *end.teachers)] == [m.header for m in (student, *teachers)]
    assert_close("state", end.teachers[1].layers[0].memory, last.teachers[1].layers[0].memory, 1e-5)
    quiet, state, metrics = loss(student, Piece(first.ids), None)
    assert quiet is None and metrics == {} and state.tokens == 0 and state.student.tokens == 12
    span = Span.from_lengths([5, 12], 12)
    padded, _, _ = loss(student, Piece(first.ids, first.targets.masked_fill(~span.valid, -100), span), None)
    rows = [Piece(first.ids[:1, :5], first.targets[:1, :5]), Piece(first.ids[1:], first.targets[1:])]
    assert padded.item() == pytest.approx(sum(loss(student, row, None)[0].item() for row in rows), rel=1e-5)


def test_in_the_training_loop_and_resumed(tmp_path) -> None:
    """The carried states of all models are part of a checkpoint; teachers do not change."""
    teacher = decoder(1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    data = Stream([torch.arange(300).remainder(7).numpy()], rows=2, length=10)

    def run(out, steps: int) -> Decoder:
        student = decoder(0)
        config = TrainConfig(steps=steps, schedule="constant", checkpoint_every=2, device="cpu", lr=1e-2)
        train(student, data, config, out, loss=distill(student, [teacher]), quiet=True)
        return student

    whole = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    again = run(tmp_path / "b", 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(weight.grad is None for weight in teacher.parameters()) and not teacher.training
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert {"ce", "soft", "loss"} <= rows[0].keys()


def test_the_model() -> None:
    model = rm.model("babyhgrn", vocab=VOCAB, dim=16, layers=3, key_dim=8)
    bounds = [m.Gamma for m in model.modules() if isinstance(m, LowerBound)]
    assert bounds[0] is None and bounds[1] is bounds[2]  # shared, and none in the first layer
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, VOCAB)
    assert rm.find("babyhgrn").kind == "training" and len(rm.find("babyhgrn").builder(vocab=9, dim=16, layers=1).blocks) == 1


def test_wrong_use() -> None:
    student, logits = decoder(0), torch.zeros(2, 5)
    with pytest.raises(UsageError, match="no teachers"):
        distill(student, [])
    with pytest.raises(UsageError, match="teacher 2 has a vocabulary of 9, the student one of 20"):
        distill(student, [decoder(1), decoder(1, vocab=9)])
    with pytest.raises(UsageError, match="teacher 1 is the student itself"):
        distill(student, [student])
    for wrong in ({"alpha": 1.5}, {"temperature": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(UsageError, match="alpha must be in 0..1 and temperature above 0"):
            distill(student, [decoder(1)], **wrong)
    with pytest.raises(UnknownName, match="losses"):
        distill(student, [decoder(1)], average="loss")
    with pytest.raises(ShapeError, match=r"\[2, 5\], the teachers' \[2, 6\]"):
        soft_loss(logits, [torch.zeros(2, 6)])


def test_soft_loss_is_not_negative_and_zero_for_equals() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, 8, generator=random)
    assert bool((soft_loss(a, [b]) > 0).all()) and float(soft_loss(a, [a + 3.0]).abs().max()) < 1e-5
    half: Tensor = soft_loss(a.bfloat16(), [b.bfloat16()])
    assert half.dtype == torch.float32
