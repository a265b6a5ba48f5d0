"""Distillation from several teachers, and BabyHGRN: an HGRN2 language model trained on few words with it (arXiv 2412.15978, 2308.02019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..catalog import system
from ..errors import ShapeError, UsageError, unknown
from ..mixers.hgrn import tie_lower_bounds
from ..models import Decoder, Model, ModelConfig
from ..state import State
from .data import IGNORE, Piece
from .loop import Loss

AVERAGES = ("logits", "losses")


class DistillState(State):
    student: State
    teachers: tuple  # the states of the teachers, in order


def soft_loss(student: Tensor, teachers: Sequence[Tensor], temperature: float = 2.0, average: str = "logits") -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) at each position; logits [..., V] -> [...], in float32 at least.

    Of several teachers, average="logits" takes the mean of their logits, "losses" the mean of their losses. T^2 keeps the gradient's scale.
    """
    if any(teacher.shape != student.shape for teacher in teachers) or not teachers:
        shapes = ", ".join(str(list(teacher.shape)) for teacher in teachers) or "none"
        raise ShapeError(f"the student's logits have shape {list(student.shape)}, the teachers' {shapes}; they must agree.")
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = (student.to(wide) / temperature).log_softmax(-1)
    soft = torch.stack([teacher.to(wide) for teacher in teachers]) / temperature
    if average == "logits":
        soft = soft.mean(0, keepdim=True)
    return temperature**2 * F.kl_div(log_q.expand_as(soft), soft.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean(0)


def distill(student: Model, teachers: Sequence[Model], alpha: float = 0.5, temperature: float = 2.0, average: str = "logits") -> Loss:
    """A loss for the training loop, `train(student, data, config, out, loss=distill(student, teachers))`; at every target

        alpha CE(target, student) + (1 - alpha) T^2 KL(teachers || student)

    The teachers are put into eval mode and read the same pieces; their states are carried beside the student's. Reports "ce" and "soft".

    BabyLlama's recipe, which BabyHGRN follows: alpha 0.5, T 2, the teachers' logits averaged. In its code the KL is summed over the
    positions of a sequence (`batchmean` of [B, T, V] divides by B only), so it counts T times as much against a mean CE as the formula
    says; here both are means over the targets. Raises UsageError if a teacher's vocabulary is not the student's.
    """
    if not teachers:
        raise UsageError("there are no teachers; distill needs at least one.")
    for index, teacher in enumerate(teachers, start=1):
        if teacher.vocab != student.vocab:
            raise UsageError(f"teacher {index} has a vocabulary of {teacher.vocab}, the student one of {student.vocab}; they must agree.")
        if teacher is student:
            raise UsageError(f"teacher {index} is the student itself; give a copy.")
        teacher.eval()
    if not 0 <= alpha <= 1 or not 0 < temperature < float("inf"):
        raise UsageError(f"alpha is {alpha} and temperature {temperature}; alpha must be in 0..1 and temperature above 0.")
    if average not in AVERAGES:
        raise unknown("average", average, AVERAGES)

    def loss(model: Model, piece: Piece, state: State | None) -> tuple[Tensor | None, State, dict[str, Tensor]]:
        assert state is None or isinstance(state, DistillState)
        before = [None] * len(teachers) if state is None else state.teachers
        own = model(piece.ids, None if state is None else state.student, piece.span, logits="none")
        with torch.no_grad():
            pairs = zip(teachers, before, strict=True)
            read = [teacher.to(piece.ids.device)(piece.ids, old, piece.span, logits="none") for teacher, old in pairs]
            new = DistillState(student=own.state, teachers=tuple(out.state for out in read))
            if not piece.count:
                return None, new, {}
            assert piece.targets is not None
            wanted = piece.targets != IGNORE
            taught = [teacher.head(out.hidden[wanted]) for teacher, out in zip(teachers, read)]
        logits = model.head(own.hidden[wanted])  # [N, V], where something is to be predicted only
        hard = F.cross_entropy(logits.float(), piece.targets[wanted], reduction="sum")
        soft = soft_loss(logits, taught, temperature, average).sum()
        metrics = {"ce": hard.detach() / piece.count, "soft": soft.detach() / piece.count}
        return alpha * hard + (1 - alpha) * soft, new, metrics

    return loss


@system(
    "babyhgrn",
    kind="training",
    paper="arXiv:2412.15978",
    year=2024,
    name="BabyHGRN",
    example={"vocab": 64, "dim": 32, "layers": 2, "key_dim": 8},
    state="HGRN2's, layers times",
    parity="torch's cross_entropy and kl_div; one teacher equal to the student leaves the cross-entropy",
    claim="On a million words the distilled student beats its own run without teachers.",
)
def babyhgrn(vocab: int, dim: int = 256, layers: int = 6, key_dim: int | None = None, ffn: float = 8 / 3, tie: bool = True) -> Decoder:
    """An HGRN2 language model whose layers share the lower bounds of their forget gates, to be trained with `distill`.

    The paper's has about 360M parameters and reads 10M or 100M words of BabyLM; its exact sizes are uncertain (from memory), and so are
    the defaults here. Judge it with `evaluate.minimal_pairs` (BLiMP).
    """
    spec = {"mixer": "hgrn2", "times": layers} | ({} if key_dim is None else {"key_dim": key_dim})
    model = Decoder(ModelConfig(vocab=vocab, dim=dim, layers=[spec], ffn=ffn, tie=tie))
    if layers > 1:
        tie_lower_bounds(model)
    return model


babyhgrn.role = "model"  # rm.model finds it too
