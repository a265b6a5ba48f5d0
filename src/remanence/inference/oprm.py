"""OPRM: a recurrent state overflows on a long context, so read it in chunks and answer from one of them (arXiv 2505.07793)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..catalog import system
from ..errors import ShapeError, UsageError, positive
from ..models import Model
from ..span import Span
from ..state import State
from .generate import greedy


@dataclass(frozen=True)
class OPRM:
    """What `oprm` found. ids: the answer (of all chunks kept, one after the other, where `summarize`); chunk: the one that was chosen.

    entropy [n] float32, in nats, of the first answer token after each chunk; kept [n] bool: not filtered out as "I do not know". state:
    after prefix, the chunk chosen and question, one row; None where `summarize`.
    """

    ids: list[int]
    chunk: int
    entropy: Tensor
    kept: Tensor
    state: State | None


@system(
    "oprm",
    kind="serving",
    paper="arXiv:2505.07793",
    year=2025,
    name="OPRM (overflow prevention)",
    state="one state a chunk while the question is read, then one",
    parity="one chunk that covers everything gives ordinary generation",
    claim="A model trained at 512 tokens keeps its passkey and MQAR accuracy at 8 to 64 times that.",
)
@torch.no_grad()
def oprm(
    model: Model,
    context: Tensor,
    question: Tensor,
    prefix: Tensor | None = None,
    chunk: int = 2000,
    max_new: int = 32,
    eos: Collection[int] = (),
    unknown: Collection[int] = (),
    at_once: int = 64,
    summarize: bool = False,
) -> OPRM:
    """Answer `question` about `context` by the chunk whose answer is the most certain: that of minimal entropy.

    Every chunk of `chunk` tokens is read after the `prefix` and before the question, all from forks of one state and `at_once` of them as
    a batch; the entropy of the first answer token (float32, temperature 1) picks one, and the rest is generated from its state alone.
    context, question, prefix: ids [T] int64. unknown: tokens that mean "not here" (the question should ask for one); chunks whose most
    probable first token is one of these are dropped, unless all are. summarize: answer from every chunk that is kept instead, and join.
    Raises ShapeError on ids that are not one row, UsageError on an empty context or question.
    """
    positive(chunk=chunk, max_new=max_new, at_once=at_once)
    for name, ids in (("context", context), ("question", question), ("prefix", prefix)):
        if ids is not None and ids.ndim != 1:
            raise ShapeError(f"{name} has shape {list(ids.shape)}; expected ids [T] of one row.")
    if not len(context) or not len(question):
        raise UsageError("the context or the question is empty; both must have some tokens.")
    fork = None
    if prefix is not None and len(prefix):
        fork = model(prefix[None], logits="none").state
    chunks = context.split(chunk)
    states, first = [], []
    for start in range(0, len(chunks), at_once):
        rows = chunks[start : start + at_once]
        lengths = [len(row) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        span = None if min(lengths) == max(lengths) else Span.from_lengths(lengths, ids.shape[1], device=ids.device)
        read = model(ids, fork and fork.rows([0] * len(rows)), span, logits="none")
        asked = model(question.expand(len(rows), -1), read.state, logits="last")
        assert asked.logits is not None
        states += [asked.state.rows([row]) for row in range(len(rows))]
        first.append(asked.logits[:, 0])
    logits = torch.cat(first)  # [n, V]
    log_p = logits.float().log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    kept = torch.tensor([token not in unknown for token in logits.argmax(-1).tolist()], device=logits.device)
    if not kept.any():
        kept = torch.ones_like(kept)
    best = int(entropy.masked_fill(~kept, torch.inf).argmin())
    if summarize:
        answers = [greedy(model, states[i], logits[i : i + 1], max_new, eos)[0] for i in kept.nonzero()[:, 0].tolist()]
        return OPRM([token for answer in answers for token in answer], best, entropy, kept, None)
    return OPRM(greedy(model, states[best], logits[best : best + 1], max_new, eos)[0], best, entropy, kept, states[best])
