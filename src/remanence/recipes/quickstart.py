"""The model that ships: it reads facts of the bAbI kind in book text and keeps them for as long as it reads (docs/headline.md).

A small Decoder: local attention, a delta-rule memory whose write gate can be exactly shut, local attention. It never sees more than a few
thousand tokens at a time; what makes it last for millions is that a token which is not written leaves the memory bit for bit as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..corpus import folder_texts, training_texts
from ..files import write_text
from ..models import Decoder, Model, ModelConfig
from ..state import State
from ..tasks.babi import ACTORS, PHRASES, ROOMS
from ..tasks.babilong import BABILong, Haystack, sentences
from ..tokenizers import BPETokenizer, Tokenizer, stream_encode
from ..train.config import Run, TrainConfig
from ..train.curriculum import Curriculum
from ..train.data import Piece
from ..train.environment import environment
from ..train.gates import opening_cost, recorded

VOCAB = 4096
STAGES = (64, 128, 256, 512, 1024, 2048)
"""Tokens of a training stream, stage by stage; a stage is over when 95 % of its questions are answered."""
PRICES = (0.003, 0.03, 0.03, 0.03, 0.03, 0.5)
"""What an open gate costs at each stage: next to nothing while the memory learns to be of use, then enough to shut all it can spare."""
OTHERS = ("I", "He", "She", "They", "Elizabeth", "Jane", "Joe", "Pip", "Arthur", "Lucy", "Tom", "Anna", "The captain", "My mother")
"""Who else goes to rooms."""
TOKENS = 8192
"""Tokens of a batch at every stage."""


def reader(vocab: int = VOCAB, dim: int = 128) -> Decoder:
    """The architecture: 1.0M parameters, a state of 100 kB."""
    near = {"mixer": "attention", "heads": 4, "window": 32}
    memory = {"mixer": "gated-deltanet", "heads": 2, "key_dim": 32, "value_dim": 64, "write": "hard", "forget": False}
    return Decoder(ModelConfig(vocab=vocab, dim=dim, layers=[near, memory, near], ffn=2.0))


@dataclass(frozen=True)
class Asked(Piece):
    """A stream and what is asked at its end, on a fork for every question.

    rows [N]: the stream each question is about. questions [N, Tq]: question and answer; answers [N, Tq]: what to predict at each
    position, -100 before the answer. price: what an open gate costs (see `answer_loss`).
    """

    rows: Tensor = torch.empty(0, dtype=torch.long)
    questions: Tensor = torch.empty(0, dtype=torch.long)
    answers: Tensor = torch.empty(0, dtype=torch.long)
    price: float = 0.0

    @property
    def count(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> Asked:
        return replace(self, **{name: getattr(self, name).to(device) for name in ("ids", "rows", "questions", "answers")})


class Facts:
    """Streams of book text with facts about who went where, and the question where everyone is who was mentioned.

    A stream holds 1 to 10 facts (fewer where they would not fit) about 1 to 4 people, anywhere between sentences, behind a space or a new
    line. Half of the streams read the books as they are, half as BABILong does, without line ends and short sentences.

    line_ends: False leaves out the new lines and the books as they are, which makes the first stage several times shorter.
    hard: the curriculum is at its end, up to one fact in 48 tokens, and decoys are mixed in, which no question is about: the books' own
    sentences with one of the people or rooms in them, and others who went to a room.
    """

    carries = False

    def __init__(
        self,
        texts: Mapping[str, str],
        tokenizer: Tokenizer,
        hard: bool = False,
        line_ends: bool = True,
        tokens: int = TOKENS,
        stages: tuple[int, ...] = STAGES,
    ):
        text = "\n\n".join(texts.values())
        self.noises = (Haystack.encode(text, tokenizer), *((plain(text, tokenizer),) if line_ends else ()))
        self.before = (" ", " ", " ", "\n", "\n\n") if line_ends else (" ",)
        self.tokens, self.hard, self.curriculum = tokens, hard, Curriculum(stages, advance=0.95, window=40)
        self.curriculum.stage = len(stages) - 1 if hard else 0
        self.prices = PRICES[-len(stages) :]
        self.people, self.verbs = tuple(ACTORS), PHRASES["move"]
        encode = lambda text: np.array(tokenizer.encode(text))  # noqa: E731
        self.fact = {
            (before, a, v, r): encode(f"{before}{a} {v} the {r}.")
            for before in (" ", "\n", "\n\n", "")
            for a in self.people
            for v in self.verbs
            for r in ROOMS
        }
        self.longest = max(map(len, self.fact.values()))
        word = re.compile(rf"\b(?:{'|'.join((*ACTORS, *ROOMS))})\b")
        own = [encode(" " + sentence) for sentence in sentences(text) if word.search(sentence)]
        others = [encode(f" {who} {v} the {r}.") for who in OTHERS for v in self.verbs for r in ROOMS]
        self.decoys = [[ids for ids in own if len(ids) <= 48], others]
        self.question = {a: tokenizer.encode(f" Where is {a}?") for a in self.people}
        self.answer = {r: [*tokenizer.encode(f" {r}"), tokenizer.eos] for r in ROOMS}

    def batch(self, seed: int, index: int) -> Asked:
        rng = np.random.default_rng([seed, index])
        stage = self.curriculum.stage
        price = self.prices[stage]
        if stage > 1 and rng.random() < 0.3:  # keep what the earlier stages taught
            stage = int(rng.integers(stage))
        length = self.curriculum.stages[stage]
        streams, asked = zip(*(self.stream(rng, length) for _ in range(max(1, self.tokens // length))))
        rows, questions, answers = [], [], []
        for row, places in enumerate(asked):
            for person, room in places.items():
                question, answer = self.question[person], self.answer[room]
                rows.append(row)
                questions.append([*question, *answer[:-1]])
                answers.append([-100] * (len(question) - 1) + answer)
        as_tensor = lambda values: torch.from_numpy(np.array(values))  # noqa: E731
        return Asked(
            as_tensor(np.stack(streams)), rows=as_tensor(rows), questions=as_tensor(questions), answers=as_tensor(answers), price=price
        )

    def stream(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, dict[str, str]]:
        """`length` tokens of text with facts and, if hard, decoys in it; and where everyone mentioned is at the end."""
        people = rng.permutation(len(self.people))[: rng.integers(1, 5)]
        places: dict[str, str] = {}
        pieces: list[np.ndarray] = []
        begins = len(self.before) > 1 and rng.random() < 0.1  # a text may begin with a fact
        most = min(length // self.longest, max(10, length // 48 if self.hard else 0))
        for _ in range(int(np.exp(rng.uniform(0, np.log(most + 1)))) if self.hard else int(rng.integers(1, most + 1))):
            person = self.people[people[rng.integers(len(people))]]
            rooms = [room for room in ROOMS if room != places.get(person)]
            places[person] = rooms[rng.integers(len(rooms))]
            before = "" if begins and not pieces else self.before[rng.integers(len(self.before))]
            pieces.append(self.fact[before, person, self.verbs[rng.integers(len(self.verbs))], places[person]])
        room = length - sum(map(len, pieces))
        for _ in range(int(rng.integers(0, 2 + length // 256)) if self.hard else 0):
            choice = self.decoys[rng.integers(2)]
            decoy = choice[rng.integers(len(choice))] if choice else np.empty(0, np.int64)
            if len(decoy) <= room:
                pieces.insert(int(rng.integers(begins, len(pieces) + 1)), decoy)
                room -= len(decoy)
        noise_of = self.noises[rng.integers(len(self.noises))]
        sentence = int(rng.integers(len(noise_of.bounds) - 1))
        start = noise_of.place(sentence)
        noise = np.empty(room, np.int64)
        noise_of.copy(start, noise)
        ends = [noise_of.place(i) - start for i in range(sentence, noise_of.before(start + room) + 1)]
        slots = np.sort(rng.choice([end for end in ends if end <= room], len(pieces)))
        if begins:
            slots[0] = 0
        parts, read = [], 0
        for piece, slot in zip(pieces, slots):
            parts += [noise[read:slot], piece]
            read = slot
        return np.concatenate([*parts, noise[read:]]), places

    def observe(self, metrics: dict[str, float]) -> dict[str, Any]:
        self.curriculum.observe(metrics["accuracy"])
        return {"length": self.curriculum.top}

    def state(self) -> dict[str, Any]:
        return self.curriculum.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.curriculum.restore(state)


def plain(text: str, tokenizer: Tokenizer) -> Haystack:
    """A text as it is, line ends and all, as a ring whose bounds are the places where a sentence has just ended."""
    tokens = np.array([i for ids in stream_encode(tokenizer, [text]) for i in ids], np.int32)
    words = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    ends = np.array([word.endswith((".", "!", "?", ".\u201d", "!\u201d", "?\u201d", '."', '!"', '?"')) for word in words])
    starts = np.array([word.startswith((" ", "\n")) for word in words])
    bounds = 1 + np.flatnonzero(ends[tokens[:-1]] & starts[tokens[1:]])
    return Haystack(tokens, np.array([0, *bounds, len(tokens)]))


def answer_loss(model: Model, piece: Asked, state: State | None) -> tuple[Tensor, State, dict[str, Tensor]]:
    """Cross-entropy of the answers plus the price of the gates that are open while the text is read, for each question."""
    with recorded(model) as gates:
        after = model(piece.ids, state, logits="none").state
    opened = opening_cost(gates)
    share = torch.cat([(z > 0).float().flatten() for z in gates]).mean()
    wanted = piece.answers != -100
    hidden = model(piece.questions, after.rows(piece.rows), logits="none").hidden
    logits, answers = model.head(hidden[wanted]), piece.answers[wanted]
    right = (logits.argmax(-1) == answers).view(piece.count, -1).all(1)
    value = F.cross_entropy(logits.float(), answers) + piece.price * opened
    return value * piece.count, after, {"accuracy": right.float().mean(), "open": share, "opening_cost": opened}


def accuracy(model: Model, tokenizer: Tokenizer, length: int, samples: int, seed: int = 1) -> float:
    """Share of BABILong qa1 questions answered right, first token, in the book that training never saw."""
    examples = BABILong().sample(seed=seed, n=samples, length=length, task="qa1", tokenizer=tokenizer)
    with torch.no_grad():
        state = None
        for piece in torch.from_numpy(np.stack([example.ids for example in examples])).split(4096, 1):
            state = model(piece, state, logits="none").state
        questions = torch.tensor([tokenizer.encode(" " + example.question) for example in examples])
        guess = model(questions, state, logits="last").logits.argmax(-1)[:, 0]
    return sum(tokenizer.decode([int(g)]).strip() == e.answer for g, e in zip(guess, examples)) / samples


def recipe(
    out: str | Path = "runs/quickstart",
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    fast: bool = False,
    data: str | None = None,
) -> Run:
    """Two runs of one model: `learn`, the curriculum, and `harden`, in which decoys and more facts to a stream clean up what is written.

    fast: the first run only, short and without line ends: a model in minutes that is useful on running text. data: a folder of .txt files
    in place of the training books.
    """
    texts = folder_texts(data) if data else training_texts()
    words = [*ACTORS, *ROOMS, *(word for verb in PHRASES["move"] for word in verb.split())]
    tokenizer = BPETokenizer.train(texts.values(), VOCAB, words)
    torch.manual_seed(seed)
    model = reader(tokenizer.vocab_size)
    steps = steps or (1100 if fast else 2400)
    learn = TrainConfig(
        steps=steps, lr=2e-3, schedule="wsd", warmup=100, floor=0.02, beta2=0.98, seed=seed, device=device,
        best="accuracy_4k", maximize=True, eval_every=250, checkpoint_every=250, log_every=10,
    )  # fmt: skip
    # A solved task has gradients of norm 0.02; one error of norm 25, cut to no less than 1, could undo it.
    harden = replace(learn, steps=max(1, steps // 4), lr=5e-4, schedule="cosine", clip=0.2, seed=seed + 1)

    def evaluate(model: Model) -> dict[str, float]:
        return {"accuracy_1k": accuracy(model, tokenizer, 1000, 64), "accuracy_4k": accuracy(model, tokenizer, 4000, 64)}

    def finish(model: Model, out: Path) -> None:
        provenance = {
            "recipe": "quickstart",
            "seed": seed,
            "learn": learn.to_dict(),
            "harden": None if fast else harden.to_dict(),
            "texts": {name: len(text) for name, text in texts.items()},
            "environment": environment(model.device),
        }
        model.save(out / "model", provenance)
        tokenizer.save(out / "model")
        measured = {length: accuracy(model, tokenizer, length, 64, seed=2) for length in (1000, 4000, 16000)}
        rows = [{"task": "babilong", "length": length, "accuracy": share, "n": 64} for length, share in measured.items()]
        write_text(out / "results.json", json.dumps({"rows": rows, "meta": provenance}, indent=2) + "\n")

    if fast:
        return Run(model, Facts(texts, tokenizer, line_ends=False), learn, evaluate, finish, answer_loss)
    last = Run(model, Facts(texts, tokenizer, hard=True), harden, evaluate, finish, answer_loss, name="harden")
    return Run(model, Facts(texts, tokenizer), learn, evaluate, None, answer_loss, name="learn", others=(last,))
