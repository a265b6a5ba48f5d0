"""Session: one endless stream that is read, asked about, continued, forked, rewound and saved; its memory does not grow with the stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, cast

import torch
from safetensors import safe_open
from torch import Tensor

from .corpus import iter_text
from .errors import StateError, UsageError, positive
from .files import tensor_digest
from .mixers.base import check_state
from .models import Model, load
from .span import Span
from .state import Growing, State
from .tokenizers import Tokenizer, load_tokenizer, stream_encode

PIECE = 4096
"""Tokens of one call of the model: what is in memory at once."""
RECENT = 1 << 16
"""Token ids kept, so that a rewind can read again from a snapshot before it."""
PER_OCTAVE = 2
"""Snapshots kept between n and 2n tokens ago, for every n = 1, 2, 4, ...: 2 log2(stream) of them in all."""
BLANK = " \t\n\r\f\v"
LONGEST_BLANK = 1 << 16

Progress = Callable[[int], None]


def shipped() -> Path:
    """The folder of the checkpoint that comes with the package."""
    return Path(__file__).parent / "checkpoints" / "reader"


def load_reader(folder: str | Path | None = None, device: torch.device | str = "cpu") -> tuple[Model, Tokenizer]:
    """The model and the tokenizer of a folder, by default the shipped checkpoint. Raises UsageError if something is missing or damaged."""
    if folder is None:
        folder = shipped()
        if not folder.is_dir():
            raise UsageError("this installation has no shipped checkpoint; name a model folder (--model DIR).")
    return load(folder, device), load_tokenizer(folder)


@dataclass(frozen=True)
class Answer:
    """What a model answered. logits [V] float32: those of the first token of the answer; ids: the tokens written, without the end mark."""

    text: str
    logits: Tensor = field(repr=False)
    ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """sha256 of the logits: equal digests, equal bits."""
        return tensor_digest({"logits": self.logits})


@torch.no_grad()
def answer(model: Model, tokenizer: Tokenizer, state: State | None, questions: Sequence[str], max_new: int = 12) -> list[Answer]:
    """Ask question i of row i of `state` (None: nothing was read), greedily, until eos or `max_new` tokens. `state` stays as it is.

    A question is fed as encode(" " + question), stripped; shorter ones are padded on the right. Raises UsageError on an empty question.
    """
    positive(max_new=max_new)
    if not all(question.strip() for question in questions):
        raise UsageError("the question is empty; it must have some text.")
    asked = [tokenizer.encode(" " + question.strip()) for question in questions]
    width = max(map(len, asked))
    ids = torch.tensor([row + [tokenizer.pad] * (width - len(row)) for row in asked], device=model.device)  # [B, T]
    lengths = [len(row) for row in asked]
    span = None if min(lengths) == width else Span.from_lengths(lengths, width, device=model.device)
    out = model(ids, state, span, logits="last")
    first = cast(Tensor, out.logits)[:, 0].float().cpu()  # [B, V]
    written: list[list[int]] = [[] for _ in asked]
    going = set(range(len(asked)))
    for step in range(max_new):
        token = cast(Tensor, out.logits)[:, 0, : tokenizer.vocab_size].argmax(-1)  # [B]; a model may have more ids than mean something
        for row, value in enumerate(token.tolist()):
            if value == tokenizer.eos:
                going.discard(row)
            elif row in going:
                written[row].append(value)
        if not going or step == max_new - 1:
            break
        out = model(token[:, None], out.state, logits="last")
    return [Answer(tokenizer.decode(row).strip(), logits, tuple(row)) for row, logits in zip(written, first)]


class Session:
    """A model that reads one stream.

    `state` is what it holds after `tokens` tokens (None before the first); it is a value, so `fork` costs nothing. White space at the end
    of what was read is held back in `pending` until more text comes, because a tokenizer joins a space to the word after it: read(a),
    read(b) gives the tokens of read(a + b) wherever the cut is beside white space. A cut inside a word ends the word there; to read text
    that arrives in arbitrary cuts give `read` one iterable.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer):
        if tokenizer.vocab_size > model.vocab:
            raise UsageError(f"the tokenizer has {tokenizer.vocab_size} ids and the model {model.vocab}; it must have as many or more.")
        self.model, self.tokenizer = model, tokenizer
        self.state: State | None = None
        self.tokens = 0
        self.pending = ""
        self._snapshots: list[tuple[int, State | None]] = [(0, None)]  # oldest first
        self._recent: list[Tensor] = []  # the last ids read, in pieces; RECENT of them or a few more
        self.source = ""

    @property
    def state_bytes(self) -> int:
        """Bytes of the state: what one stream costs, however long it is."""
        return self.state.nbytes if self.state else 0

    @property
    def snapshots(self) -> list[int]:
        """The token counts that `rewind` returns to without reading again."""
        return [tokens for tokens, _ in self._snapshots]

    def read(self, text: str | Path | Iterable[str], progress: Progress | None = None) -> Self:
        """Read a text, a UTF-8 file (a Path, or a string that names an existing file), or an iterable of pieces of text cut anywhere.

        Memory does not depend on the length. progress(n) is called after every n tokens. Where the text fails on the way, what came before
        has been read. Raises UsageError on an empty text, and what `corpus.iter_text` raises on a file.
        """
        if isinstance(text, str):
            if not text:
                raise UsageError("the text is empty; there is nothing to read.")
            text = Path(text) if _names_file(text) else [text]
        pieces = iter_text(text) if isinstance(text, Path) else text
        held: list[int] = []
        for ids in stream_encode(self.tokenizer, self._hold_back(pieces)):
            held += ids
            while len(held) >= PIECE:
                self.feed(held[:PIECE], progress)
                del held[:PIECE]
        if held:
            self.feed(held, progress)
        return self

    def _hold_back(self, pieces: Iterable[str]) -> Iterator[str]:
        """The same text without the white space at its end, which stays in `pending`."""
        for piece in pieces:
            piece = self.pending + piece
            body = piece.rstrip(BLANK)
            if len(piece) - len(body) > LONGEST_BLANK:
                body = piece
            self.pending = piece[len(body) :]
            if body:
                yield body

    @torch.no_grad()
    def feed(self, ids: Sequence[int] | Tensor, progress: Progress | None = None) -> Self:
        """Read token ids [T], in calls of at most 4096."""
        ids = torch.as_tensor(ids, dtype=torch.long)
        for piece in ids.split(PIECE):
            if len(piece) == 0:
                continue
            self.state = compact(self.model(piece[None].to(self.model.device), self.state, logits="none").state)
            self.tokens += len(piece)
            self._remember(piece)
            if progress:
                progress(len(piece))
        return self

    def _remember(self, piece: Tensor) -> None:
        """Keep a snapshot and the ids; let go of those that are too many."""
        if self._recent and len(self._recent[-1]) < PIECE // 4:  # single tokens, of generate, are gathered
            self._recent[-1] = torch.cat([self._recent[-1], piece])
        else:
            self._recent.append(piece)
        kept = sum(map(len, self._recent))
        while kept - len(self._recent[0]) >= RECENT:
            kept -= len(self._recent.pop(0))
        octaves: dict[int, int] = {}
        thinned = []
        for at, state in reversed([*self._snapshots, (self.tokens, self.state)]):  # in each octave the newest and the oldest stay
            octave = (self.tokens - at).bit_length()
            octaves[octave] = octaves.get(octave, 0) + 1
            if octaves[octave] > PER_OCTAVE:
                thinned[-1] = (at, state)
            else:
                thinned.append((at, state))
        self._snapshots = thinned[::-1]

    def ask(self, question: str, max_new: int = 12) -> Answer:
        """Ask on a fork: this session stays as it is. Raises UsageError on an empty question."""
        return answer(self.model, self.tokenizer, self.state, [question], max_new)[0]

    @torch.no_grad()
    def generate(self, prompt: str, max_new: int = 64, temperature: float = 0.0, top_k: int | None = None, seed: int = 0) -> str:
        """Read the prompt, write on, and read what was written: the stream continues with both. Returns what was written.

        temperature 0 takes the likeliest token; else one is drawn from softmax(logits / temperature), of the `top_k` likeliest if given.
        Ends before the tokenizer's eos or after `max_new` tokens. Raises UsageError on an empty prompt.
        """
        positive(max_new=max_new)
        if top_k is not None:
            positive(top_k=top_k)
        if not 0 <= temperature < float("inf"):
            raise UsageError(f"temperature is {temperature}; it must be a number >= 0.")
        text = self.pending + prompt
        ids = self.tokenizer.encode(text)
        if not ids or not prompt:
            raise UsageError("the prompt is empty; generation continues from at least one character.")
        self.pending = ""
        self.feed(ids[:-1])
        random = torch.Generator().manual_seed(seed)
        written: list[int] = []
        token = ids[-1]
        while True:
            out = self.model(torch.tensor([[token]], device=self.model.device), self.state, logits="last")
            self.state, self.tokens = out.state, self.tokens + 1
            self._remember(torch.tensor([token]))
            if len(written) == max_new:
                break
            token = _choose(cast(Tensor, out.logits)[0, 0, : self.tokenizer.vocab_size].float().cpu(), temperature, top_k, random)
            if token == self.tokenizer.eos:
                break
            written.append(token)
        return self.tokenizer.decode(written)

    def fork(self) -> Session:
        """A session that goes its own way from here; states are shared, not copied."""
        other = Session(self.model, self.tokenizer)
        other.state, other.tokens, other.pending, other.source = self.state, self.tokens, self.pending, self.source
        other._snapshots, other._recent = list(self._snapshots), list(self._recent)
        return other

    def rewind(self, tokens: int) -> Self:
        """Go back to what was held after `tokens` tokens.

        A snapshot there is taken as it is. Else the nearest earlier one is, and the tokens after it are read again: to the bits where the
        cuts of the calls are the same, else to rounding. Raises StateError where those are no longer kept; `snapshots` lists what is.
        """
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens <= self.tokens:
            raise UsageError(f"rewind to {tokens!r}; it must be a whole number of tokens in 0..{self.tokens}.")
        if tokens == self.tokens:
            return self
        at, state = next((snapshot for snapshot in reversed(self._snapshots) if snapshot[0] <= tokens), (-1, None))
        recent = torch.cat(self._recent) if self._recent else torch.empty(0, dtype=torch.long)
        first = self.tokens - len(recent)
        if at < 0 or (at < tokens and at < first):
            kept = ", ".join(map(str, self.snapshots))
            raise StateError(f"token {tokens} cannot be rewound to: tokens are kept from {first} on, and snapshots at {kept}.")
        between = recent[at - first : tokens - first] if at < tokens else None
        self.state, self.tokens, self.pending = state, at, ""
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot[0] <= at]
        self._recent = [recent[: at - first]] if at > first else []
        return self.feed(between) if between is not None else self

    def save(self, path: str | Path) -> None:
        """Write the state as State.save does, with the held-back white space, the model's folder and a print of its weights beside it.

        `State.load` reads the same file as a bare state. Snapshots are not saved. Raises StateError if nothing was read or the state holds
        NaN, FileError if the file cannot be written; an existing file is replaced whole or not at all.
        """
        if self.state is None:
            raise StateError("nothing was read yet; there is no state to save.")
        note = json.dumps({"pending": self.pending, "tokens": self.tokens, "source": self.source, "weights": fingerprint(self.model)})
        self.state.save(path, lambda header: {"session": note, "session_sha256": _note_digest(header["sha256"], note)})

    @classmethod
    def load(cls, path: str | Path, model: Model, tokenizer: Tokenizer) -> Self:
        """The session saved at `path` (a bare saved state will do), to the same bits; model and tokenizer must be those it was made with.

        Raises StateError, naming the file, if it is missing, truncated or tampered with, or was made by another model.
        """
        state = State.load(path, model.device)
        try:
            check_state(state, model.header, 1, model.device)
        except StateError as error:
            raise StateError(f"{path} does not fit this model: {error}") from None
        note = read_note(path)
        if note and note["weights"] != fingerprint(model):
            raise StateError(
                f"{path} was made by a model of this shape with other weights; it continues only with the weights that made it."
            )
        session = cls(model, tokenizer)
        session.state, session.tokens = state, note.get("tokens", state.tokens)
        session.pending, session.source = note.get("pending", ""), note.get("source", "")
        session._snapshots = [(session.tokens, state)]
        return session

    def __repr__(self) -> str:
        return f"Session({self.tokens} tokens read, {self.state_bytes} bytes of state)"


def read_note(path: str | Path) -> dict:
    """What a session wrote beside its state: pending, tokens, source, weights; {} for a bare state.

    Raises StateError if the file is not one of safetensors, or the note was changed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except Exception as error:
        reason = "does not exist" if not Path(path).exists() else "is a directory" if Path(path).is_dir() else "is not a safetensors file"
        raise StateError(f"{path} {reason}; expected a state file written by Session.save or State.save.") from error
    if "session" not in header:
        return {}
    if header.get("session_sha256") != _note_digest(header.get("sha256", ""), header["session"]):
        raise StateError(f"{path} was changed after it was saved: the session's note does not match its digest.")
    return json.loads(header["session"])


def compact(state: State) -> State:
    """The same state, holding no more memory than it needs: the end of a long call may be a view that keeps the whole call alive."""

    def leaf(value: Tensor | Growing) -> Tensor | Growing:
        if isinstance(value, Growing) or value.untyped_storage().nbytes() <= 2 * value.nbytes:
            return value
        return value.clone()

    return state._rebuild(leaf)


def fingerprint(model: Model) -> str:
    """sha256 over every tensor's name, shape and up to 4096 evenly spaced values: tells weights apart at a constant cost a tensor."""
    sampled = {}
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sampled[f"{name} {list(tensor.shape)}"] = flat[:: max(1, -(-len(flat) // 4096))]
    return tensor_digest(sampled)


def _note_digest(state_digest: str, note: str) -> str:
    return hashlib.sha256((state_digest + note).encode()).hexdigest()


def _names_file(text: str) -> bool:
    try:
        return len(text) < 4096 and "\n" not in text and Path(text).is_file()
    except (OSError, ValueError):
        return False


def _choose(logits: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> int:
    """One token of logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=random))
