"""bAbI: short stories about people, rooms and things, simulated, each with questions whose answers follow from a few of its sentences.

Weston et al. 2015 (arXiv 1502.05698): the worlds and schedules of the public generator, the wording of the released v1.2 files. A new task
is one function: it takes a `random.Random` and returns the lines of one story, each a fact (str) or an `Asked`; decorate it with
`@simulator`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from os import PathLike
from pathlib import Path

import numpy as np

from ..catalog import system
from ..errors import UsageError, unknown
from ..files import write_text
from .base import Example, Fact, Task, Tokenizer, default_tokenizer, pick, stream

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = {"apple": "kitchen", "football": "garden", "milk": "kitchen"}
ACTORS = {"John": "kitchen", "Mary": "bedroom", "Sandra": "garden", "Daniel": "hallway"}
GIVERS = {"Bill": "kitchen", "Fred": "bedroom", "Jeff": "garden", "Mary": "hallway"}
"""Where everyone and everything starts. The reader is never told, so a room counts as known only once the text implies it."""

PHRASES = {
    "move": ("moved to", "went to", "went back to", "journeyed to", "travelled to"),
    "get": ("got", "grabbed", "picked up", "took"),
    "drop": ("dropped", "discarded", "left", "put down"),
    "give": ("gave", "passed", "handed"),
}
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), ROOMS),
    "qa5": (*GIVERS, *OBJECTS),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), ("no", "yes")),
    "qa7": ("none", "one", "two", "three"),
    "qa8": (*OBJECTS, "nothing"),
    "qa10": ("maybe", "no", "yes"),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
"""The possible answers of each of the 20 tasks; qa7 to qa20 can be read from official files but are not simulated here."""


@dataclass(frozen=True)
class Story:
    """One sample: the facts told so far, a question, its answer, and the indices of the facts that settle it, ascending."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A question line of a story; `support` indexes the facts of the story, questions not counted."""

    question: str
    answer: str
    support: tuple[int, ...]


Lines = list[str | Asked]
Simulator = Callable[[random.Random], Lines]
SIMULATORS: dict[str, Simulator] = {}


def simulator(function: Simulator) -> Simulator:
    """Register the simulator of the task that the function is named after."""
    SIMULATORS[function.__name__] = function
    return function


Action = tuple[str, ...]  # (actor, verb, room or object), and the receiver of a give


class World:
    """Who is where and who holds what, and, beside that truth, which of it a reader of the facts can know."""

    def __init__(self, rng: random.Random, actors: dict[str, str]):
        self.rng = rng
        self.room = dict(actors)  # actor -> room
        self.place = dict(OBJECTS)  # object -> room, or the actor who holds it
        self.lines: Lines = []
        self.facts = 0
        self.told: dict[str, int] = {}  # actor -> the fact of its last move: from then on its room is known
        self.handled: dict[str, int] = {}  # object -> the fact of its last get, drop or give
        self.left: dict[str, int | None] = {}  # dropped object -> the last move of the one who dropped it
        self.trail: dict[str, list[tuple[str, tuple[int, ...]]]] = {thing: [] for thing in OBJECTS}  # known rooms, and why

    def draw(self, verbs: Sequence[str], *domains: Sequence[str]) -> Action | None:
        """A valid action, by rejection: uniform actor, verb and arguments, at most 100 times. None where none was found."""
        actors = tuple(self.room)
        for _ in range(100):
            action = (pick(self.rng, actors), pick(self.rng, verbs), *(pick(self.rng, domain) for domain in domains))
            if self.valid(action):
                return action
        return None

    def valid(self, action: Action) -> bool:
        actor, verb, what, *to = action
        if verb == "move":
            return self.room[actor] != what
        if verb == "get":
            return self.place[what] == self.room[actor]
        if verb == "drop":
            return self.place[what] == actor
        return self.place[what] == actor and to[0] != actor and self.room[to[0]] == self.room[actor]

    def perform(self, action: Action) -> None:
        """Change the world and tell it."""
        actor, verb, what, *to = action
        if verb == "move":
            self.room[actor], self.told[actor] = what, self.facts
        else:
            self.place[what] = {"get": actor, "drop": self.room[actor], "give": to[0] if to else ""}[verb]
            self.handled[what] = self.facts
            if verb == "drop":
                self.left[what] = self.told.get(actor)
        self.tell(self.phrase(action))
        for thing, rooms in self.trail.items():
            support = self.known(thing)
            if support and (not rooms or rooms[-1][0] != self.where(thing)):
                rooms.append((self.where(thing), support))

    def phrase(self, action: Action) -> str:
        actor, verb, what, *to = action
        phrase = pick(self.rng, PHRASES[verb])
        if verb == "move":
            tail = ""
        elif verb == "give":
            tail = f" to {to[0]}"
        else:
            tail = pick(self.rng, ("", " there"))
        return f"{actor} {phrase} the {what}{tail}."

    def tell(self, fact: str) -> None:
        self.lines.append(fact)
        self.facts += 1

    def ask(self, question: str, answer: str, support: Iterable[int]) -> None:
        self.lines.append(Asked(question, answer, tuple(sorted(set(support)))))

    def where(self, thing: str) -> str:
        """The true room of an object."""
        return self.room.get(self.place[thing], self.place[thing])

    def known(self, thing: str) -> tuple[int, ...] | None:
        """The facts from which the object's room follows: the last handling and the move before or after it. None if it does not follow."""
        if thing not in self.handled:
            return None
        holder = self.place[thing]
        move = self.told.get(holder) if holder in self.room else self.left[thing]
        return None if move is None else tuple(sorted((move, self.handled[thing])))

    def act(self, classes: Sequence[tuple[tuple[str, ...], tuple[Sequence[str], ...]]]) -> Action:
        """A valid action of a uniformly drawn class (verbs, domains); a class that finds none is drawn again."""
        while True:
            verbs, domains = pick(self.rng, classes)
            action = self.draw(verbs, *domains)
            if action:
                return action


MOVE = (("move",), (ROOMS,))
HANDLE = (("get", "drop"), (tuple(OBJECTS),))


def _walks(rng: random.Random, ask: Callable[[World, str], tuple[str, str]]) -> Lines:
    """Five times: two moves, then a question about someone who was mentioned."""
    world = World(rng, ACTORS)
    for _ in range(5):
        for _ in range(2):
            world.perform(world.act((MOVE,)))
        actor = pick(rng, tuple(world.told))
        question, answer = ask(world, actor)
        world.ask(question, answer, (world.told[actor],))
    return world.lines


@simulator
def qa1(rng: random.Random) -> Lines:
    """One supporting fact: where is an actor?"""
    return _walks(rng, lambda world, actor: (f"Where is {actor}?", world.room[actor]))


@simulator
def qa6(rng: random.Random) -> Lines:
    """Yes or no: is an actor in a room? True with probability 1/2."""

    def ask(world: World, actor: str) -> tuple[str, str]:
        answer, truth = pick(rng, ("yes", "no")), world.room[actor]
        room = truth if answer == "yes" else pick(rng, [room for room in ROOMS if room != truth])
        return f"Is {actor} in the {room}?", answer

    return _walks(rng, ask)


def _things(rng: random.Random, askable: Callable[[World, str], bool], ask: Callable[[World, str], None]) -> Lines:
    """Actions until five questions were asked, each with probability 1/2 at every action from the third after the last question on."""
    world = World(rng, ACTORS)
    questions = since = 0
    while questions < 5:
        # Get, drop and move are drawn alike, but get and drop lead to one sampler, which they share.
        world.perform(world.act((HANDLE, HANDLE, MOVE)))
        since += 1
        if since > 2 and rng.random() < 0.5:
            things = [thing for thing in OBJECTS if askable(world, thing)]
            if things:
                ask(world, pick(rng, things))
                questions, since = questions + 1, 0
    return world.lines


@simulator
def qa2(rng: random.Random) -> Lines:
    """Two supporting facts: where is an object, which was carried?"""

    def ask(world: World, thing: str) -> None:
        world.ask(f"Where is the {thing}?", world.where(thing), world.known(thing) or ())

    return _things(rng, lambda world, thing: world.known(thing) is not None, ask)


@simulator
def qa3(rng: random.Random) -> Lines:
    """Three supporting facts: where was an object before the room it came to last?"""

    def ask(world: World, thing: str) -> None:
        (before, why), (last, because) = world.trail[thing][-2:]
        world.ask(f"Where was the {thing} before the {last}?", before, why + because)

    return _things(rng, lambda world, thing: len(world.trail[thing]) > 1, ask)


@simulator
def qa4(rng: random.Random) -> Lines:
    """Two-argument relations: three rooms in a row, told from neighbour to neighbour; a question about the middle one."""
    rooms: list[str] = []
    while len(rooms) < 3:
        room = pick(rng, ROOMS)
        if room not in rooms:
            rooms.append(room)
    onward = pick(rng, ("north", "east"))  # rooms[i + 1] lies onward of rooms[i]
    pairs = [(rooms[0], rooms[1]), (rooms[1], rooms[2])]
    if rng.random() < 0.5:
        pairs.reverse()
    lines: Lines = []
    for near, far in pairs:
        if rng.random() < 0.5:
            lines.append(f"The {far} is {onward} of the {near}.")
        else:
            lines.append(f"The {near} is {OPPOSITE[onward]} of the {far}.")
    middle, answer, way = rooms[1], *pick(rng, ((rooms[2], onward), (rooms[0], OPPOSITE[onward])))  # the answer lies `way` of the middle
    question = f"What is {way} of the {middle}?" if rng.random() < 0.5 else f"What is the {middle} {OPPOSITE[way]} of?"
    lines.append(Asked(question, answer, tuple(i for i, pair in enumerate(pairs) if answer in pair)))
    return lines


@simulator
def qa5(rng: random.Random) -> Lines:
    """Three-argument relations: who gave what to whom?

    Up to five more actions follow the give that is asked about; they leave its object alone and do not repeat a give between the same two.
    Here they change the world as well (the public generator only prints them), so that the story stays consistent.
    """
    things = tuple(OBJECTS)
    classes = ((("get",), (things,)), (("give",), (things, tuple(GIVERS))), MOVE)
    world = World(rng, GIVERS)
    questions = since = 0
    while questions < 5:
        action = world.act(classes)
        world.perform(action)
        since += 1
        actor, verb, thing, *to = action
        if verb != "give" or since < 2:
            continue
        support, to = world.facts - 1, to[0]
        for _ in range(int(rng.random() * 6)):
            other = world.act(classes)
            while other[2] == thing or (other[:2] == (actor, "give") and other[3] == to):
                other = world.act(classes)
            world.perform(other)
        forms = (
            (f"What did {actor} give to {to}?", thing),
            (f"Who received the {thing}?", to),
            (f"Who did {actor} give the {thing} to?", to),
            (f"Who gave the {thing} to {to}?", actor),
            (f"Who gave the {thing}?", actor),
        )
        world.ask(*pick(rng, forms), (support,))
        questions, since = questions + 1, 0
    return world.lines


def _simulated(task: str, rng: random.Random) -> Iterator[Lines]:
    if task not in SIMULATORS:
        raise unknown("bAbI task", str(task), SIMULATORS)
    while True:
        yield SIMULATORS[task](rng)


def split(lines: Lines) -> list[Story]:
    """One sample per question, with every fact told before it; earlier questions are left out."""
    facts: list[str] = []
    samples = []
    for line in lines:
        if isinstance(line, str):
            facts.append(line)
        else:
            samples.append(Story(tuple(facts), line.question, line.answer, line.support))
    return samples


def stories(task: str = "qa1", n: int = 1000, seed: int = 0) -> list[Story]:
    """The first n samples of a simulated corpus, in the order of an official file: the questions of one story follow each other.

    Raises UnknownName for a task that has no simulator.
    """
    simulated = _simulated(task, stream("babi", task, seed))
    return list(islice((story for lines in simulated for story in split(lines)), n))


def draw(task: str, n: int, seed: int, pool: Sequence[Story] | None, admit: Callable[[Story], bool], wanted: str) -> list[Story]:
    """n independent samples that `admit` accepts. From the simulator, or from `pool` in random order, and round again when it is used up.

    Sample i depends on task, seed and i alone, so that at another length the same questions are asked wherever they fit.
    Raises UsageError, saying what was `wanted`, where nothing is admitted.
    """
    nothing = UsageError(f"no {task} story fits {wanted}.")
    if pool is not None:
        order = [story for story in pool if admit(story)]
        if not order:
            raise nothing
        rng = stream("babi-pool", task, seed)
        order = sorted(order, key=lambda _: rng.random())
        return [order[i % len(order)] for i in range(n)]
    drawn = []
    for i in range(n):
        rng = stream("babi-draw", task, seed, i)
        for lines in islice(_simulated(task, rng), 1000):
            story = pick(rng, split(lines))
            if admit(story):
                drawn.append(story)
                break
        else:
            raise nothing
    return drawn


def write_official(path: str | Path, task: str = "qa1", n: int = 1000, seed: int = 0) -> None:
    """Write n simulated questions in the format of the official v1.2 files; `read_official` gives back what `stories` gives."""
    out, asked = [], 0
    for lines in _simulated(task, stream("babi", task, seed)):
        numbers: list[int] = []  # fact -> line number
        for number, line in enumerate(lines, 1):
            if asked == n:
                break
            if isinstance(line, str):
                numbers.append(number)
                out.append(f"{number} {line}")
            else:
                support = " ".join(str(numbers[i]) for i in line.support)
                out.append(f"{number} {line.question} \t{line.answer}\t{support}")
                asked += 1
        if asked == n:
            break
    write_text(path, "".join(line + "\n" for line in out))


def read_official(path: str | PathLike[str]) -> list[Story]:
    """The samples of an official bAbI file (v1.2: lines `n text`; a question is `n question<TAB>answer<TAB>numbers of the supporting
    lines`).

    A line numbered 1 starts a new story. Raises UsageError naming the file and the line that cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a bAbI file: {error}.") from error
    samples: list[Story] = []
    facts: dict[int, str] = {}  # line number -> fact, of the present story
    expected = 1
    for row, line in enumerate(text.rstrip("\n").split("\n"), 1):
        head, space, rest = line.partition(" ")
        if not (head.isdecimal() and space and rest.strip()):
            raise UsageError(f"{path}, line {row}: {line!r} is not a number, a space and a sentence.")
        number = int(head)
        if number == 1:
            facts = {}
        elif number != expected:
            raise UsageError(f"{path}, line {row}: the number is {number}; it must be {expected}, or 1 for a new story.")
        expected = number + 1
        fields = rest.split("\t")
        if len(fields) == 1:
            facts[number] = rest.strip()
            continue
        if len(fields) != 3 or not fields[0].strip() or not fields[1].strip():
            raise UsageError(f"{path}, line {row}: a question must be question, answer and supporting lines, apart by tabs; got {rest!r}.")
        index = {number: i for i, number in enumerate(facts)}
        support = []
        for word in fields[2].split():
            if not word.isdecimal() or int(word) not in index:
                raise UsageError(f"{path}, line {row}: the support {word!r} is not the number of an earlier fact of the story.")
            support.append(index[int(word)])
        samples.append(Story(tuple(facts.values()), fields[0].strip(), fields[1].strip(), tuple(sorted(support))))
    if not samples:
        raise UsageError(f"{path} holds no question; a bAbI file has one after every few facts.")
    return samples


def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_ACTOR, _ROOM, _THING, _WAY = (f"({_any(words)})" for words in ({**ACTORS, **GIVERS}, ROOMS, OBJECTS, OPPOSITE))
_FACT = re.compile(
    rf"\b(?:{_ACTOR} (?:{_any(PHRASES['move'])} the {_ROOM}|({_any(PHRASES['get'])}|{_any(PHRASES['drop'])}) the {_THING}(?: there)?"
    rf"|{_any(PHRASES['give'])} the {_THING} to {_ACTOR})|The {_ROOM} is {_WAY} of the {_ROOM})\."
)


def _parse(text: str) -> Iterator[Action]:
    """Every sentence of the text that has the exact form of a fact, whatever stands around it; a relation is (room, way, other room)."""
    for match in _FACT.finditer(text):
        actor, room, handling, thing, given, receiver, subject, way, other = match.groups()
        if subject:
            yield subject, way, other
        elif room:
            yield actor, "move", room
        elif given:
            yield actor, "give", given, receiver
        else:
            yield actor, "get" if handling in PHRASES["get"] else "drop", thing


def _room_of(facts: list[Action], actor: str) -> str | None:
    return next((what for who, verb, what, *_ in reversed(facts) if who == actor and verb == "move"), None)


def _rooms_of(facts: list[Action], thing: str) -> list[str]:
    """The rooms that an object was in, one after the other, as far as the facts tell."""
    rooms: list[str] = []
    room: dict[str, str] = {}
    holder = None
    for actor, verb, what, *to in facts:
        if verb == "move":
            room[actor] = what
        elif what == thing:
            holder = to[0] if to else actor
        here = room.get(holder or "")
        if here and (what == thing or actor == holder) and rooms[-1:] != [here]:
            rooms.append(here)
        if verb == "drop" and what == thing:
            holder = None
    return rooms


def _beside(facts: list[Action], middle: str, way: str) -> str | None:
    """What lies `way` of the middle."""
    for subject, told, other, *_ in facts:
        if (other, told) == (middle, way):
            return subject
        if (subject, told) == (middle, OPPOSITE[way]):
            return other
    return None


def _gift(facts: list[Action], field: int, **known: str) -> str | None:
    """A field of the last give that agrees with what is known of it."""
    place = {"giver": 0, "thing": 2, "receiver": 3}
    gifts = [fact for fact in facts if fact[1] == "give" and all(fact[place[name]] == value for name, value in known.items())]
    return gifts[-1][field] if gifts else None


def _before(facts: list[Action], thing: str, room: str) -> str | None:
    rooms = _rooms_of(facts, thing)
    later = [i for i, seen in enumerate(rooms) if seen == room and i > 0]
    return rooms[later[-1] - 1] if later else None


def _is_in(facts: list[Action], actor: str, room: str) -> str | None:
    seen = _room_of(facts, actor)
    return seen and ("yes" if seen == room else "no")


_SOLVERS: tuple[tuple[str, str, Callable[..., str | None]], ...] = (
    ("qa1", rf"Where is {_ACTOR}\?", _room_of),
    ("qa2", rf"Where is the {_THING}\?", lambda facts, thing: (_rooms_of(facts, thing) or [None])[-1]),
    ("qa3", rf"Where was the {_THING} before the {_ROOM}\?", _before),
    ("qa4", rf"What is {_WAY} of the {_ROOM}\?", lambda facts, way, middle: _beside(facts, middle, way)),
    ("qa4", rf"What is the {_ROOM} {_WAY} of\?", lambda facts, middle, way: _beside(facts, middle, OPPOSITE[way])),
    ("qa5", rf"What did {_ACTOR} give to {_ACTOR}\?", lambda facts, giver, to: _gift(facts, 2, giver=giver, receiver=to)),
    ("qa5", rf"Who received the {_THING}\?", lambda facts, thing: _gift(facts, 3, thing=thing)),
    ("qa5", rf"Who did {_ACTOR} give the {_THING} to\?", lambda facts, giver, thing: _gift(facts, 3, giver=giver, thing=thing)),
    ("qa5", rf"Who gave the {_THING} to {_ACTOR}\?", lambda facts, thing, to: _gift(facts, 0, thing=thing, receiver=to)),
    ("qa5", rf"Who gave the {_THING}\?", lambda facts, thing: _gift(facts, 0, thing=thing)),
    ("qa6", rf"Is {_ACTOR} in the {_ROOM}\?", _is_in),
)


def task_of(question: str) -> str | None:
    """The task that asks questions of this form, or None."""
    return next((task for task, form, _ in _SOLVERS if re.fullmatch(form, question.strip())), None)


def solve(text: str, question: str) -> str:
    """The answer, by rule, from the sentences of the text that have the form of a fact (qa1 to qa6).

    Raises UsageError for a question of another form, or one that the text does not settle.
    """
    for _, form, solver in _SOLVERS:
        match = re.fullmatch(form, question.strip())
        if match:
            answer = solver(list(_parse(text)), *match.groups())
            if answer is None:
                raise UsageError(f"the text does not settle {question!r}.")
            return answer
    raise UsageError(f"the question {question!r} has none of the forms that qa1 to qa6 use.")


def score_answer(answer: str, output: str, question: str, labels: Iterable[str]) -> bool:
    """BABILong's official metric. In lower case, up to the first '.', '<context>' or '<example>' of the output: the labels that occur in it
    and not in the question must be the answer alone; of an answer that lists several (commas, more than 3 characters), exactly those."""
    output = re.split(r"\.|<context>|<example>", output.lower(), maxsplit=1)[0]
    question, answer = question.lower(), answer.lower()
    found = {label for label in map(str.lower, labels) if label in output and label not in question}
    wanted = set(answer.split(",")) if "," in answer and len(answer) > 3 else {answer}
    return found == wanted


def task_name(task: str) -> str:
    """Check the name of a bAbI task."""
    if task not in LABELS:
        raise unknown("bAbI task", str(task), LABELS)
    return task


def facts_alone(story: Story, task: str, tokenizer: Tokenizer) -> Example:
    """The context that holds the facts and nothing else."""
    pieces = encode_facts(story, tokenizer)
    starts = [0, *accumulate(map(len, pieces))]
    facts = tuple(Fact(fact, start) for fact, start in zip(story.facts, starts))
    ids = np.array([i for piece in pieces for i in piece], np.int64)
    return Example(ids, story.question, story.answer, facts, story.support, LABELS[task])


class BabiTask(Task):
    """What `babi-gen` and `babilong` share: `task` ('qa1' ..., the default of `sample`), its labels, the scorer and the oracle."""

    def __init__(self, task: str = "qa1"):
        self.task = task_name(task)
        self.labels = LABELS[task]
        self.chance = 1 / len(self.labels)

    def score(self, example: Example, output: str) -> bool:
        """The official metric of BABILong: see `score_answer`."""
        return score_answer(example.answer, output, example.question, example.labels)

    def oracle(self, example: Example, tokenizer: Tokenizer | None = None) -> str:
        """The answer, by rule, from the context's text and the question (qa1 to qa6)."""
        return solve(example.text(tokenizer), example.question)


@system("babi-gen", kind="benchmark", paper="arXiv:1502.05698", year=2015, name="bAbI", aliases=("babi",))
class BabiGen(BabiTask):
    """bAbI stories without noise: can the model do the reasoning at all? Accuracy here is the ceiling of BABILong."""

    def sample(
        self,
        seed: int = 0,
        n: int = 8,
        length: int = 0,
        task: str | None = None,
        tokenizer: Tokenizer | None = None,
        facts: Sequence[Story] | str | PathLike[str] | None = None,
    ) -> list[Example]:
        """n stories, each cut at one of its questions, drawn uniformly.

        length: the most tokens a context may have, 0 for no limit; longer stories are drawn again. facts: the stories, or an official file
        of them; None simulates them (qa1 to qa6). Raises UsageError where no story is short enough.
        """
        task, tokenizer = task_name(task or self.task), tokenizer or default_tokenizer()

        def admit(story: Story) -> bool:
            return not length or sum(map(len, encode_facts(story, tokenizer))) <= length

        drawn = draw(task, n, seed, pool_of(facts), admit, f"in {length} tokens; give a longer length, or 0 for no limit")
        return [facts_alone(story, task, tokenizer) for story in drawn]


def encode_facts(story: Story, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each fact, with a leading space."""
    return [tokenizer.encode(" " + fact) for fact in story.facts]


def pool_of(facts: Sequence[Story] | str | PathLike[str] | None) -> Sequence[Story] | None:
    """The stories to draw from: as given, read from an official file, or None to simulate."""
    return read_official(facts) if isinstance(facts, str | PathLike) else facts
