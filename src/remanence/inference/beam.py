"""Beam search over states: the best continuations are kept, and with each of them its state, whatever that state is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, positive
from ..models.base import Model
from ..models.encdec import EncoderDecoder
from ..span import Span
from ..state import State

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


@torch.no_grad()
def beam_search(
    step: Step, logits: Tensor, state: State, eos: int, most: int = 256, beams: int = 5, penalty: float = 1.0
) -> list[list[int]]:
    """The continuation of each row that scores best, without `eos`: the sum of its log probabilities / tokens ** penalty.

    logits [B, V]: of the first token. step(ids [N, 1], state) -> (logits [N, V], state). most: tokens at most, `eos` among them. A beam
    that has ended stays as it is, as long as it is among the best. All tensors of the state are reordered with the beams.
    """
    positive(most=most, beams=beams)
    rows, vocab = logits.shape
    if not 0 <= eos < vocab:
        raise UsageError(f"eos is {eos}; it must be in 0..{vocab - 1}.")
    first = torch.arange(rows, device=logits.device)[:, None]
    live = min(beams, vocab)
    scores, token = logits.float().log_softmax(-1).topk(live)  # [B, beams]
    written, done = token[..., None], token == eos
    parent = first.expand(-1, live)  # the row, in the state, of what each beam goes on from
    while written.shape[-1] < most and not bool(done.all()):
        logits, state = step(token.reshape(-1, 1), state.rows(parent.reshape(-1)))
        log = logits.float().log_softmax(-1).view(rows, -1, vocab).masked_fill(done[..., None], -torch.inf)
        log[..., eos] = log[..., eos].masked_fill(done, 0)
        total = (scores[..., None] + log).flatten(1)
        scores, flat = total.topk(min(beams, total.shape[1]))
        before, token = flat // vocab, flat % vocab
        written = torch.cat([written.gather(1, before[..., None].expand(-1, -1, written.shape[-1])), token[..., None]], -1)
        parent = first * done.shape[1] + before
        done = done.gather(1, before) | (token == eos)
    lengths = ((written == eos).cumsum(-1) == 0).sum(-1) + done  # [B, beams], with the end
    best = (scores / lengths**penalty).argmax(1)
    lines = [line[i].tolist() for line, i in zip(written, best.tolist())]
    return [line[: line.index(eos)] if eos in line else line for line in lines]


@torch.no_grad()
def translate(
    model: Model | EncoderDecoder,
    source: Tensor,
    eos: int,
    bos: int | None = None,
    valid: Tensor | None = None,
    most: int = 256,
    beams: int = 5,
) -> list[list[int]]:
    """The ids that a model writes after source [B, S]; valid [B, S] bool is False at padding. beams=1 is greedy.

    A Model is given the prompt (source, SEP) and goes on. An EncoderDecoder is given the source, and its target starts with `bos`.
    """
    if isinstance(model, EncoderDecoder):
        if bos is None:
            raise UsageError("bos is None; the target of an encoder-decoder starts with it.")
        start = torch.full_like(source[:, :1], bos)
        logits, state = model.step(start, model.read(source, valid))
        return beam_search(lambda ids, old: _last(*model.step(ids, old)), logits[:, -1], state, eos, most, beams)
    out = model(source, span=None if valid is None else Span(valid), logits="last")

    def step(ids: Tensor, old: State) -> tuple[Tensor, State]:
        new = model(ids, old, logits="last")
        return new.logits[:, 0], new.state

    return beam_search(step, out.logits[:, 0], out.state, eos, most, beams)


def _last(logits: Tensor, state: State) -> tuple[Tensor, State]:
    return logits[:, -1], state
