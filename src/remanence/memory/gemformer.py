"""GEMFormer: the tokens of a document that a model is sure of (or is not) are put before every segment of it (arXiv 2311.18151)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import ShapeError, UsageError, positive, unknown
from ..models.base import Model, Output

RULES = ("low", "high", "lowest", "highest")


def entropy(logits: Tensor) -> Tensor:
    """-sum_v p_v log p_v in nats of softmax(logits), logits [..., V] -> [...], in float32 at least."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)


def select(uncertainty: Tensor, rule: str = "low", threshold: float = 1.0, budget: int = 200) -> Tensor:
    """Which of the tokens [N] enter the memory: their indices in document order, at most `budget`.

    'low', 'high': below or above the threshold, and of these the most extreme ones if they are too many; 'lowest', 'highest': the most
    extreme ones whatever their value. A NaN or infinite uncertainty (a token that nothing predicted) is never selected.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if uncertainty.ndim != 1:
        raise ShapeError(f"uncertainty has shape {list(uncertainty.shape)}; expected [N], one number a token.")
    positive(budget=budget)
    fits = uncertainty.isfinite()
    if rule == "low":
        fits = fits & (uncertainty < threshold)
    elif rule == "high":
        fits = fits & (uncertainty > threshold)
    among = fits.nonzero()[:, 0]
    order = uncertainty[among].argsort(descending=rule.startswith("high"), stable=True)[:budget]
    return among[order].sort().values


def or_softmax_loss(scores: Sequence[Tensor], gold: Sequence[Tensor]) -> Tensor:
    """-log of the probability that the softmax over all positions of all segments gives to all gold positions together.

    scores: of each segment [n_i]; gold: bool [n_i]. Leave memory positions out of both. Raises UsageError if nothing is gold.
    """
    every, right = torch.cat(list(scores)), torch.cat(list(gold))
    if every.shape != right.shape or not bool(right.any()):
        raise UsageError(f"gold has shape {list(right.shape)} for {list(every.shape)} scores; at least one of them must be gold.")
    return every.logsumexp(0) - every[right].logsumexp(0)


@system(
    "gemformer",
    kind="text-memory",
    paper="arXiv:2311.18151",
    year=2023,
    name="GEMFormer",
    example={"segment": 8, "budget": 4},
    state="at most `budget` token ids",
    parity="an empty memory is the backbone on [question | segment]",
    claim="On two-hop questions over 4 segments it is above the same model without memory.",
)
class GEMFormer(nn.Module):
    """memory = gemformer.collect(question, document); logits = gemformer(question, document, memory), ids [Q] and [N] of one document.

        pass 1   for every segment: H_j = entropy of the model's prediction of token j, given [question | segment]
                 memory: the ids of the tokens that `select` picks from all segments, in document order
        pass 2   every segment again, as [question | memory | segment]

    backbone: a Model, whose prediction of a token stands before it, or any callable ids [1, T] -> logits [1, T, V] of the tokens
    themselves, such as the masked `models.encoder.Encoder`. The thresholds and budgets of the paper are uncertain; its question-answering
    heads are left to the user (`or_softmax_loss` is their loss), and so is renewing the memory every epoch. A memory of tokens is text, not
    a state: two passes over a whole document do not stream. segment: S. rule, threshold, budget: see `select`.
    """

    def __init__(
        self,
        backbone: Model | Callable[[Tensor], Tensor],
        segment: int = 128,
        rule: str = "lowest",
        threshold: float = 1.0,
        budget: int = 200,
    ):
        super().__init__()
        positive(segment=segment, budget=budget)
        if rule not in RULES:
            raise unknown("rule", rule, RULES)
        if not callable(backbone):
            raise UsageError(f"backbone is a {type(backbone).__name__}; gemformer needs a Model or a callable that gives logits.")
        self.backbone, self.segment, self.rule, self.threshold, self.budget = backbone, segment, rule, threshold, budget

    def predict(self, ids: Tensor) -> Tensor:
        """Logits [T, V] for ids [T]: at each position what the backbone gives there."""
        out = self.backbone(ids[None])
        logits = out.logits if isinstance(out, Output) else out
        return logits[0]  # type: ignore[index]

    @torch.no_grad()
    def uncertainty(self, question: Tensor, document: Tensor) -> Tensor:
        """H of every token of the document [N], each given its segment and the question; infinite for a token that nothing predicts."""
        found, before = [], len(question)
        for part in self._segments(question, document):
            h = entropy(self.predict(torch.cat([question, part])))
            if isinstance(self.backbone, Model):
                h = torch.cat([h.new_full((1,), torch.inf), h[:-1]])
            found.append(h[before:])
        return torch.cat(found)

    def collect(self, question: Tensor, document: Tensor) -> Tensor:
        """The memory: ids [M], M <= budget."""
        return document[select(self.uncertainty(question, document), self.rule, self.threshold, self.budget)]

    def forward(self, question: Tensor, document: Tensor, memory: Tensor | None = None) -> Tensor:
        """Logits at the document's tokens [N, V], each segment read as [question | memory | segment]; memory: `collect`'s unless given."""
        memory = self.collect(question, document) if memory is None else memory
        front = torch.cat([question, memory])
        return torch.cat([self.predict(torch.cat([front, part]))[len(front) :] for part in self._segments(question, document)])

    def _segments(self, question: Tensor, document: Tensor) -> tuple[Tensor, ...]:
        if question.ndim != 1 or document.ndim != 1 or not len(document):
            raise ShapeError(f"question and document have shapes {list(question.shape)} and {list(document.shape)}; expected ids [Q], [N].")
        return document.split(self.segment)
