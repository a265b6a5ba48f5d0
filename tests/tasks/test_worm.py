"""WorM in symbols: seeded bytes, an answer by rule, chance, the trials' shape and distributions, measures of behaviour, bad use."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
import torch

import remanence as rm
from remanence.errors import UsageError
from remanence.models import Decoder, ModelConfig
from remanence.tasks.base import IGNORE
from remanence.tasks.worm import JOINT, PROBLEMS, TRAINED, Trial, WorMSymbolic, frames, measures
from remanence.tasks.worm.trials import (
    BLANK,
    CELL,
    CUE,
    CUE_RATE,
    END,
    MEMORY,
    MODALITIES,
    PAD,
    PLACE,
    POINTS,
    PROBE,
    SEGMENTS,
    STEPS,
    TRIES,
    drawings,
    lit,
    moved,
    walk,
)

TASK = WorMSymbolic()
DIGESTS = {
    "sfr": "e9c22e148445941e",
    "vsr": "83b07908d93d8646",
    "vsrec": "7c48e97866fdfe19",
    "vir": "f9ed27eae673af66",
    "cd-color": "5de93b137850803d",
    "cd-orientation": "ae08e54ddd1e428f",
    "cd-size": "8616fc1391c9c7a8",
    "cd-gap": "95116f7ad64d4b16",
    "cd-conjunction": "2d82a675f1422f8b",
    "sc": "76d40e997cbb0027",
    "si": "8ec46d0defd857e7",
    "smu": "593818a807534b35",
    "sts-cued": "516330b013d7b594",
    "sts-uncued": "00dbc729e1f62039",
    "cs": "9862361f9da24581",
}
LONGEST = {"sfr": 19, "vsr": 18, "vsrec": 18, "vir": 17, "sc": 19, "si": 13, "smu": 17, "sts-cued": 20, "sts-uncued": 20, "cs": 18}
"""Frames of the longest trial; of change detection 20. The paper's models read at most 20."""


def kinds(trial: Trial) -> list[int]:
    return [frame.kind for frame in frames(trial.ids)[1]]


@pytest.mark.parametrize("task", PROBLEMS)
def test_the_trials_of_a_seed_never_change(task: str) -> None:
    arrays = [array for e in TASK.sample(seed=5, n=16, task=task) for array in (e.ids, e.targets)]
    assert sha256(b"".join(a.astype("<i8").tobytes() for a in arrays)).hexdigest()[:16] == DIGESTS[task]


@pytest.mark.parametrize("task", PROBLEMS)
def test_the_oracle_is_always_right_from_the_ids_alone(task: str) -> None:
    trials = TASK.sample(seed=3, n=150, task=task)
    for e in trials:
        answer = TASK.oracle(Trial(e.ids, np.full_like(e.targets, IGNORE), ""))
        assert answer.dtype == e.ids.dtype and (answer == np.where(e.targets == IGNORE, 0, e.targets)).all()
        assert TASK.score(e, answer) and e.correct(answer).all()
        low, high = e.choices()
        wanted = e.targets[e.targets != IGNORE]
        assert len(wanted) and (low <= wanted).all() and (wanted < high).all()
        assert e.ids.min() > PAD and e.ids.max() < TASK.vocab_size
    for name, (options, _) in PROBLEMS[task].settings.items():
        key = {"modalities": "modality", "updates": "updates", "distractors": "distractors"}.get(name, name[:-1])
        assert {e.meta[key] for e in trials} - {0} == set(options) - {0}, name
    assert max(len(kinds(e)) for e in trials) == LONGEST.get(task, 20)


EDGES = [
    ("sfr", {"list_lengths": (1, 30), "set_sizes": 30}),
    ("sfr", {"list_lengths": 100, "set_sizes": 100}),
    ("vsr", {"list_lengths": (1, 9)}),
    ("vsrec", {"list_lengths": (1, 20), "differences": (2, 36)}),
    ("vir", {"list_lengths": 1, "retentions": 0, "differences": 36}),
    ("cd-color", {"set_sizes": (1, 100), "retentions": 1}),
    ("sc", {"list_lengths": (2, 50), "differences": 2}),
    ("sc", {"list_lengths": 50, "differences": 50}),
    ("si", {"parts": (1, 12), "differences": (1, 6)}),
    ("smu", {"set_sizes": (1, 9), "updates": (0, 30)}),
    ("sts-cued", {"list_lengths": (2, 3, 60)}),
    ("sts-uncued", {"list_lengths": 2}),
    ("cs", {"distractors": 5, "modalities": "visual-spatial"}),
]


@pytest.mark.parametrize(("task", "options"), EDGES)
def test_the_oracle_is_right_at_the_edges(task: str, options: dict) -> None:
    for e in TASK.sample(seed=1, n=20, task=task, **options):
        assert TASK.score(e, TASK.oracle(e))


@pytest.mark.parametrize("task", PROBLEMS)
def test_a_guess_scores_chance(task: str) -> None:
    """Uniform guesses; what they are right at differs by less than 4.5 standard deviations from the sum of their chances."""
    rng = np.random.default_rng(4)
    guessed, chances = [], []
    for e in TASK.sample(seed=9, n=300, task=task):
        low, high = e.choices()
        guessed.append(e.correct(rng.integers(low, high)))
        chances.append(1 / (high - low))
    right, p = np.concatenate(guessed), np.concatenate(chances)
    assert abs(right.sum() - p.sum()) < 4.5 * (p * (1 - p)).sum() ** 0.5
    assert p.min() == TASK.chance_of(task) and set(p) <= {TASK.chance_of(task), 1 / 2}
    assert TASK.chance == TASK.chance_of("smu") == 1 / len(TASK.labels)


@pytest.mark.parametrize("task", [task for task in PROBLEMS if PROBLEMS[task].answers == 2 and task != "sfr"])
def test_yes_and_no_are_balanced(task: str) -> None:
    right = np.concatenate([e.targets[e.targets != IGNORE] for e in TASK.sample(seed=2, n=600, task=task)])
    assert abs(right.mean() - 0.5) < 4.5 * 0.5 / len(right) ** 0.5


def test_blank_frames_are_not_padding() -> None:
    ids, targets = TASK.batch(np.random.default_rng(0), 60, "vir")
    assert (targets[ids == PAD] == IGNORE).all() and (ids == PAD).any()
    for row, e in zip(ids, TASK.sample(seed=0, n=60, task="vir"), strict=True):
        assert (row[: len(e.ids)] == e.ids).all() and (row[len(e.ids) :] == PAD).all()
        assert kinds(e) == [MEMORY] * e.meta["list_length"] + [BLANK] * e.meta["retention"] + [PROBE]
        assert (e.ids[measures.frame_ends(e.ids)] == END).all() and len(measures.frame_ends(e.ids)) == len(kinds(e))
        assert TASK.oracle(e)[-1] == e.targets[-1] and (TASK.oracle(Trial(row, targets[0], "vir"))[len(e.ids) :] == 0).all()


def test_a_distractor_differs_in_as_many_cells_as_said() -> None:
    for task in ("vsrec", "vir"):
        for e in TASK.sample(seed=6, n=40, task=task):
            trial = frames(e.ids)[1]
            items = [set(frame.shown) for frame in trial if frame.kind == MEMORY]
            assert all(len(item) == 18 for item in items) and len(set(map(frozenset, items))) == len(items)
            for frame, position in zip([f for f in trial if f.kind == PROBE], e.meta["position"]):
                left, right = set(frame.shown[1:19]), set(frame.shown[20:])
                assert frame.shown[0] == PLACE and frame.shown[19] == PLACE + 1 and len(left ^ right) == e.meta["difference"]
                assert items[position] in (left, right)
    dark = np.array([[True] * 8 + [False] * 8])
    gone = np.concatenate([moved(np.random.default_rng(seed), dark, 3) for seed in range(400)])
    assert ((gone ^ dark).sum(1) == 6).all() and (abs((gone ^ dark).mean(0) - 3 / 8) < 0.11).all()
    assert lit(dark).tolist() == [[CELL + i for i in range(8)]]


def test_a_change_is_of_one_trait_of_one_bar() -> None:
    for task in (task for task in PROBLEMS if task.startswith("cd-")):
        trials = TASK.sample(seed=7, n=60, task=task)
        for e in trials:
            first, *_, last = frames(e.ids)[1]
            changes = [i % 5 - 1 for i, (a, b) in enumerate(zip(first.shown, last.shown, strict=True)) if a != b]
            assert changes == ([] if e.meta["trait"] < 0 else [e.meta["trait"]]) and len(first.shown) == 5 * e.meta["set_size"]
        traits = {e.meta["trait"] for e in trials}
        assert traits == {-1, 0, 1, 2, 3} if task == "cd-conjunction" else len(traits) == 2


def test_symmetry_is_broken_by_half_the_difference() -> None:
    for e in TASK.sample(seed=8, n=100, task="sc"):
        cells = [frame.shown[0] - CELL for frame in frames(e.ids)[1][:-1]]
        left = [cell for cell in cells if cell % 10 < 5]
        mirrored = {10 * (cell // 10) + 9 - cell % 10 for cell in left}
        assert 2 * len(left) == len(cells) == e.meta["list_length"]
        assert sum(cell % 10 >= 5 and cell not in mirrored for cell in cells) == e.meta["difference"] // 2


def test_paths_are_those_of_the_public_loop() -> None:
    """One step after the other in any direction, at most 51 tried: as often complete, and as often turning back, as `walk`'s."""
    rng, complete, bends, n = np.random.default_rng(0), 0, [], 600
    for _ in range(n):
        path = [divmod(int(rng.integers(POINTS**2)), POINTS)]
        for step in rng.integers(8, size=TRIES):
            to = (path[-1][0] + STEPS[step][0], path[-1][1] + STEPS[step][1])
            if len(path) <= SEGMENTS and min(to) >= 0 and max(to) < POINTS and to not in path:
                path.append(to)
        if len(path) == SEGMENTS + 1:
            complete += 1
            bends.append(len({y for y, _ in path[:5]}))
    one = np.zeros((4 * n, SEGMENTS + 1), np.int64)
    one[:, 0] = rng.integers(POINTS**2, size=4 * n)
    closed = np.eye(POINTS**2 + 1, dtype=bool)[one[:, 0]]
    closed[:, -1] = True
    good = walk(rng, one, np.ones(4 * n, np.int64), closed)
    assert abs(good.mean() - complete / n) < 4.5 * (0.25 / n * 1.25) ** 0.5
    rows = [len(set(path // POINTS)) for path in one[good][:, :5]]
    assert abs(np.mean(rows) - np.mean(bends)) < 4.5 * np.std(bends) * (1.4 / complete) ** 0.5


def test_drawings_end_differently_from_where_they_should() -> None:
    difference = np.arange(400) % 4 + 1
    path, other = drawings(np.random.default_rng(1), difference)
    for one, two, count in zip(path, other, difference):
        for line in (one, two):
            y, x = line // POINTS, line % POINTS
            assert len(set(line)) == SEGMENTS + 1 and (np.maximum(abs(np.diff(y)), abs(np.diff(x))) == 1).all()
        assert (one[:-count] == two[:-count]).all() and set(two[-count:]).isdisjoint(one)
    starts = np.bincount(drawings(np.random.default_rng(2), np.ones(1000, np.int64))[0][:, 0], minlength=25)
    assert starts.min() > 10
    for e in TASK.sample(seed=3, n=40, task="si", parts=3):
        assert len(kinds(e)) == 5 and all(len(frame.shown) == 4 for frame in frames(e.ids)[1][:-1])


def test_markers_move_uniformly_and_never_leave_their_box() -> None:
    first, finals = np.zeros(9), []
    for e in TASK.sample(seed=3, n=600, task="smu", set_sizes=2):
        trial = frames(e.ids)[1]
        assert [frame.shown[0] - PLACE for frame in trial[1:9]] == [0, 1] * 4 and sorted(e.meta["box"]) == [0, 1]
        first[trial[0].shown[1] - CELL] += 1
        finals.extend(e.targets[e.targets != IGNORE])
    assert (abs(first - 600 / 9) < 4.5 * (600 / 9) ** 0.5).all() and set(finals) == set(range(9))


def test_rules_switch_after_a_cue_or_in_turn() -> None:
    cues = chances = 0
    for e in TASK.sample(seed=4, n=300, task="sts-cued"):
        said = kinds(e)
        assert said[:2] == [MEMORY, PROBE] and said[-1] == PROBE and len(said) == 20
        after = [i for i in range(2, 19) if said[i - 1] == PROBE]
        cues, chances = cues + sum(said[i] == MEMORY for i in after), chances + len(after)
        rules = [frame.shown[0] - CUE for frame in frames(e.ids)[1] if frame.kind == MEMORY]
        assert all(a != b for a, b in zip(rules, rules[1:]))
        assert e.meta["switch"][0] == -1 and (e.meta["switch"] == 1).sum() == len(rules) - 1
    assert abs(cues - CUE_RATE * chances) < 4.5 * (CUE_RATE * (1 - CUE_RATE) * chances) ** 0.5
    for e in TASK.sample(seed=4, n=20, task="sts-uncued"):
        assert kinds(e) == [MEMORY] + [PROBE] * 19 and e.meta["switch"].tolist() == [-1] + [1] * 18


def test_complex_span_has_its_decisions_in_the_gaps() -> None:
    gaps = {0: [], 1: [5], 3: [3, 5, 7], 5: [3, 4, 5, 6, 7]}
    for e in TASK.sample(seed=5, n=120, task="cs"):
        found = [i for i, kind in enumerate(kinds(e)) if kind == PROBE]
        gap = gaps[e.meta["distractors"]]
        assert found == [*gap, *(8 + i for i in gap), 16, 17] and e.meta["position"].tolist() == [-1] * (2 * len(gap)) + [0, 1]
        kept, disturbs = e.meta["modality"].split("-")
        answers = e.targets[e.targets != IGNORE]
        assert (answers[:-2] // 2 == (disturbs == "spatial")).all()
        assert ((answers[-2:] >= 12) == (kept == "visual")).all() and (answers[-2:] >= 4).all()
    assert len(MODALITIES) == 4


def test_all_tasks_together_in_turns() -> None:
    ids, targets = TASK.batch(np.random.default_rng(0), 30, JOINT)
    assert [frames(row)[0] for row in ids] == [TRAINED[i % 14] for i in range(30)] and len(TRAINED) == 14
    for row, wanted in zip(ids, targets):
        assert (TASK.oracle(Trial(row, wanted, "")) == np.where(wanted == IGNORE, 0, wanted)).all()
    assert TASK.batch(np.random.default_rng(0), 3, JOINT)[0].shape[0] == 3


def test_a_model_learns_from_a_batch() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab=TASK.vocab_size, dim=32, layers="mingru"))
    ids, targets = map(torch.from_numpy, TASK.batch(np.random.default_rng(0), 16, "smu", set_sizes=1, updates=1))
    optimiser, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(12):
        logits = model(ids).logits
        assert logits is not None
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_accuracy_by_load_delay_and_likeness() -> None:
    trials = TASK.sample(seed=1, n=200, task="vsrec")
    correct = [np.arange(e.meta["list_length"]) < 3 for e in trials]
    assert measures.accuracy_by(trials, correct, "list_length") == pytest.approx({n: min(1, 3 / n) for n in range(2, 10)})
    assert measures.serial_position(trials, correct).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert measures.serial_position(trials, correct, 4).tolist() == [1, 1, 1, 0]
    by_both = measures.accuracy_by(trials, correct, "list_length", "position")
    assert by_both[4, 2] == 1 and by_both[4, 3] == 0 and len(by_both) == sum(range(2, 10))
    alike = [np.full(len(c), e.meta["difference"] > 4) for e, c in zip(trials, correct)]
    assert measures.accuracy_by(trials, alike, "difference") == {2: 0, 4: 0, 6: 1, 8: 1, 10: 1}
    later = TASK.sample(seed=1, n=100, task="vir")
    late = [np.array([e.meta["retention"] < 5]) for e in later]
    assert measures.accuracy_by(later, late, "retention") == {0: 1, 2: 1, 4: 1, 5: 0, 6: 0}


def test_what_is_recalled_of_a_list() -> None:
    e = TASK.sample(seed=1, n=1, task="sfr", list_lengths=5)[0]
    scores = -np.where(e.meta["position"] < 0, 50.0, e.meta["position"])
    assert measures.top_recall(e, scores).all()
    scores[e.meta["position"] == 1] = -99
    correct = measures.top_recall(e, scores)
    assert measures.serial_position([e], [correct]).tolist() == [1, 0, 1, 1, 1] and (~correct).sum() == 2


def test_the_cost_of_a_switch() -> None:
    trials = TASK.sample(seed=1, n=50, task="sts-cued")
    assert measures.switch_cost(trials, [e.meta["switch"] != 1 for e in trials]) == 1
    assert measures.switch_cost(trials, [e.correct(TASK.oracle(e)) for e in trials]) == 0
    alternating = TASK.sample(n=2, task="sts-uncued")
    with pytest.raises(UsageError, match="take sts-cued"):
        measures.switch_cost(alternating, [e.meta["switch"] != 1 for e in alternating])


def test_task_variance_and_its_clusters() -> None:
    """Three groups of units: active in the first task, in the second, in both; and one unit that is always 1."""
    rng, n = np.random.default_rng(0), 300
    scale = {"a": np.repeat([1, 0.1, 1], 10), "b": np.repeat([0.1, 1, 1], 10)}
    states = {
        task: [np.concatenate([rng.normal(size=(4 + i % 2, 30)) * s, np.ones((4 + i % 2, 1))], 1) for i in range(n)]
        for task, s in scale.items()
    }
    found = measures.task_variance(states)
    assert found.shape == (2, 31) and (found[:, :30].max(0) == 1).all() and (found[:, 30] == 0).all()
    assert (abs(found[0, 10:20] - 0.01) < 0.003).all() and (found[:, 20:30] > 0.8).all()
    one = measures.task_variance({"a": [np.array([[0.0], [4.0]]), np.array([[2.0]])], "b": [np.array([[0.0]]), np.array([[1.0]])]})
    assert one.ravel().tolist() == [1, 0.5]  # ((1 + 0) / 2, 1 / 4), over the first
    labels, score = measures.clusters(found[:, :30])
    assert [len(set(labels[i : i + 10])) for i in (0, 10, 20)] == [1, 1, 1] and len(set(labels)) == 3 and score > 0.9
    two, lower = measures.clusters(found[:, :30], count=2)
    assert len(set(two)) == 2 and lower < score


def test_it_is_in_the_catalog_with_what_people_score() -> None:
    assert isinstance(rm.task("worm"), WorMSymbolic) and isinstance(rm.task("worm-symbolic"), WorMSymbolic)
    scores = {row.setting: row.value for row in TASK.published}
    assert len(scores) == 27 and scores["smu, set size 3"] == 82.5 and scores["cd-gap, set size 6"] == 80


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "smm"}, "did you mean smu"),
        ({"task": "vsr", "list_lengths": (2, 10)}, "list_lengths has 10; in vsr it must be a whole number from 1 to 9"),
        ({"task": "vsr", "set_sizes": 3}, "vsr has no set_sizes; its settings are list_lengths"),
        ({"task": "sfr", "list_lengths": 31}, "only 30 cells are visible"),
        ({"task": "vir", "differences": 3}, "differences has 3; in vir it must be an even number from 2 to 36"),
        ({"task": "vir", "retentions": (0, -1)}, "retentions has -1"),
        ({"task": "cd-color", "set_sizes": 101}, "from 1 to 100"),
        ({"task": "sc", "list_lengths": 4, "differences": 6}, "a list has only 4 cells"),
        ({"task": "sc", "list_lengths": 11}, "an even number"),
        ({"task": "si", "parts": 5}, "one of 1, 2, 3, 4, 6, 12"),
        ({"task": "si", "differences": 7}, "from 1 to 6"),
        ({"set_sizes": ()}, "set_sizes is empty"),
        ({"set_sizes": 2.5}, "set_sizes has 2.5"),
        ({"set_sizes": True}, "set_sizes has True"),
        ({"task": "cs", "distractors": 2}, "one of 0, 1, 3, 5"),
        ({"task": "cs", "modalities": "visual"}, "one of spatial-spatial"),
        ({"task": "sts-cued", "list_lengths": 1}, "a whole number >= 2"),
        ({"set_size": 3}, "did you mean set_sizes"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_bad_use_says_so_in_one_sentence(options: dict, says: str) -> None:
    with pytest.raises(UsageError) as error:
        TASK.sample(**options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_bad_measures_and_batches_are_refused() -> None:
    trials = TASK.sample(n=2)
    good = [e.correct(TASK.oracle(e)) for e in trials]
    for call, says in [
        (lambda: measures.accuracy_by(trials, good[:1], "set_size"), "1 results"),
        (lambda: measures.accuracy_by(trials, good), "0 keys"),
        (lambda: measures.accuracy_by(trials, good, "list_length"), "has no 'list_length'"),
        (lambda: measures.accuracy_by(trials, [np.ones(30, bool)] * 2, "position"), "has 30 answers"),
        (lambda: measures.serial_position(trials, good, 3), "no trial has a list of 3"),
        (lambda: measures.top_recall(trials[0], np.zeros(100)), "needs \\(100,\\)"),
        (lambda: measures.task_variance({}), "every task needs trials"),
        (lambda: measures.task_variance({"a": [np.zeros((2, 3)), np.zeros((2, 4))]}), "all of the same units"),
        (lambda: measures.clusters(np.zeros((3, 2))), "at least 3 units"),
        (lambda: measures.clusters(np.zeros((3, 5)), count=5), "2 to 4 clusters"),
        (lambda: TASK.batch(np.random.default_rng(0), 3, JOINT, set_sizes=2), "no settings in common"),
        (lambda: TASK.oracle(Trial(np.array([1, 2]), np.array([1, 2]), "smu")), "no trial of WorM"),
        (lambda: trials[0].correct(np.zeros(99)), "output has shape"),
    ]:
        with pytest.raises(UsageError, match=says):
            call()
