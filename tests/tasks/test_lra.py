"""Long Range Arena: the exact ListOps generator, the loaders, both stand-ins, the oracle and chance."""

import pickle
import re
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image

import remanence as rm
from remanence.errors import UsageError
from remanence.tasks import LRA
from remanence.tasks.base import IGNORE
from remanence.tasks.lra import (
    CLOSE,
    DASH,
    DISC,
    EMPTY,
    END,
    GAP,
    HARD,
    LIST_END,
    LIST_PAD,
    MAX,
    MED,
    MIN,
    PAD,
    SEPARATOR,
    SIDES,
    SM,
    TASKS,
    batch,
    cifar,
    grey_png,
    listops,
    novels,
    parse_listops,
    pathfinder_files,
    pathfinder_lite,
    value_of,
)  # fmt: skip

GENERATED = ("listops", "authors", "pathfinder-lite")
DIGESTS = {
    "listops": "87c33fe172407dbb",
    "official": "87053c89fb5379d9",
    "authors": "75779ed5a4babed0",
    "pathfinder-lite": "0ce318d41ce55532",
}


def arrays(name: str, n: int = 4, seed: int = 3):
    task, official = ("listops", True) if name == "official" else (name, False)
    return batch(np.random.default_rng(seed), n, task, official=official)


def digest(*parts) -> str:
    return sha256(b"".join(np.ascontiguousarray(part, "<i8").tobytes() for part in parts)).hexdigest()[:16]


@pytest.mark.parametrize("name", DIGESTS)
def test_the_sequences_of_a_seed_never_change(name):
    assert digest(*arrays(name)) == DIGESTS[name] != digest(*arrays(name, seed=4))


@pytest.mark.parametrize("task", GENERATED)
def test_layout_and_the_oracle(task):
    lra = LRA(task)
    ids, targets = batch(np.random.default_rng(0), 40, task)
    end, pad = (LIST_END, LIST_PAD) if task == "listops" else (END, PAD)
    assert ids.shape == targets.shape and ids.dtype == targets.dtype == np.int64 and ids.max() < lra.vocab_size
    for row, target in zip(ids, targets, strict=True):
        (at,) = np.flatnonzero(target != IGNORE)
        assert row[at] == end and (row[at + 1 :] == pad).all() and (row[:at] < end).all() and 0 <= target[at] < len(lra.labels)
    for e, row in zip(lra.sample(seed=0, n=40), ids, strict=True):
        assert np.array_equal(e.ids, row[: len(e.ids)]) and e.ids[-1] == end
        assert lra.score(e, lra.oracle(e)) and not lra.score(e, (lra.oracle(e) + 1) % len(lra.labels))


def test_listops_has_the_grammar_and_the_limits():
    for kind, depth, arguments, low, high in ((False, 6, 5, 50, 200), (True, 10, 10, 500, 2000)):
        rows = LRA().sample(n=30, official=kind)
        assert len({e.ids.tobytes() for e in rows}) == 30
        deepest = widest = 0
        for e in rows:
            assert low < len(e.ids) - 1 < high
            stack: list[int] = []
            for token in e.ids[:-1].tolist():
                if MIN <= token <= SM:
                    stack.append(0)
                    deepest = max(deepest, len(stack))
                elif token == CLOSE:
                    count = stack.pop()
                    assert 2 <= count <= arguments
                    widest = max(widest, count)
                if not MIN <= token <= SM and stack:
                    stack[-1] += 1
            assert not stack
        assert deepest <= depth - 1 and widest == arguments  # the last level has digits alone
        assert deepest >= depth - 3


def test_nodes_are_operators_once_in_four():
    """Where nothing is filtered out: a root with arguments of which a quarter are operators, two to five of them, all alike often."""
    ids, _ = listops(np.random.default_rng(0), 600, max_depth=3, max_args=5, min_length=1, max_length=200)
    counts, operators = np.zeros(6), np.zeros(4)
    nested = total = 0
    for row in ids.tolist():
        level, count = 0, 0
        for token in row:
            if token >= LIST_END:
                break
            if MIN <= token <= SM:
                operators[token - MIN] += 1
                nested, total, count, level = nested + (level == 1), total + (level == 1), count + (level == 1), level + 1
            elif token == CLOSE:
                level -= 1
            elif level == 1:
                total, count = total + 1, count + 1
        counts[count] += 1
    # Different expressions are kept, and of two digits there are only 400, so short ones are a little rarer.
    assert abs(nested / total - 0.25) < 0.04 and (abs(counts[2:] / 600 - 0.25) < 0.08).all() and counts[:2].sum() == 0
    assert (abs(operators / operators.sum() - 0.25) < 0.055).all()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( ( ( [MAX 2 ) 9 ) ] )", 9),
        ("[MIN 4 [SM 7 8 9 ] 6 ]", 4),
        ("[MED 1 2 ]", 1),
        ("[MED 9 1 [MAX 3 5 X 2 ]", 3),
        ("[MED 3 8 6 ]", 6),
        ("[SM 9 9 9 ]", 7),
        ("5", 5),
    ],
)
def test_values_by_hand(text, value):
    assert value_of(parse_listops(text)) == value
    assert {MIN, MAX, MED, SM, CLOSE, LIST_END, LIST_PAD} == set(range(10, 17))


def test_a_guess_scores_chance_and_the_majority_of_listops_is_known():
    rng = np.random.default_rng(1)
    for task, chance in (("listops", 0.1), ("authors", 0.5), ("pathfinder-lite", 0.5)):
        lra, n = LRA(task), 300
        examples = lra.sample(seed=5, n=n)
        assert lra.chance == chance == 1 / len(lra.labels)
        right = sum(lra.score(e, rng.integers(len(lra.labels), size=1)) for e in examples)
        assert abs(right - n * chance) < 4.5 * (n * chance * (1 - chance)) ** 0.5
        shares = np.bincount([e.targets[-1] for e in examples], minlength=len(lra.labels)) / n
        assert 0.08 < shares.max() < 0.25 if task == "listops" else abs(shares[0] - 0.5) < 4.5 * 0.5 / n**0.5


def test_passages_are_of_their_part_of_the_novels():
    for split in ("train", "test"):
        for e in LRA("authors").sample(n=20, split=split, length=300):
            book = novels()[e.targets[-1]]
            at = book.find(e.ids[:-1].astype(np.uint8).tobytes())
            assert at >= 0 and (at < len(book) * 9 // 10) == (split == "train")


def test_pathfinder_images():
    ids, targets = pathfinder_lite(np.random.default_rng(0), 40)
    for row, label in zip(ids[:, :-1].reshape(-1, 32, 32), targets[:, -1], strict=True):
        assert set(np.unique(row)) == {0, GAP, DASH, DISC} and (row == DISC).sum() == 18
        assert not row[:2].any() and not row[-2:].any() and not row[:, :2].any() and not row[:, -2:].any()
        sizes, discs = parts(row)
        assert len(sizes) == 8 and len(discs) == (1 if label else 2)  # two curves and six distractors, none touching another
        assert sorted(sizes)[-2] >= 25 and max(sorted(sizes)[:6]) <= 20
    (e,) = LRA("pathfinder-lite").sample(n=1, length=64 * 64)
    assert len(e.ids) == 4097
    assert {len(parts(row[:-1].reshape(32, 32))[0]) for row in pathfinder_lite(np.random.default_rng(0), 5, distractors=0)[0]} == {2}


def parts(image):
    """Sizes of the connected parts of an image, and the numbers of those on which discs stand."""
    label = np.where(image > 0, np.arange(image.size).reshape(image.shape), -1)
    while True:
        padded = np.pad(label, 1, constant_values=-1)
        views = [padded[y : y + image.shape[0], x : x + image.shape[1]] for y in range(3) for x in range(3)]
        new = np.where(image > 0, np.max(views, 0), -1)
        if (new == label).all():
            break
        label = new
    numbers, sizes = np.unique(label[image > 0], return_counts=True)
    assert len(numbers) == len(sizes)
    return sizes, set(label[image == DISC].tolist())


def test_reading_imdb(tmp_path):
    for split in ("train", "test"):
        for name in ("pos", "neg"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                (tmp_path / split / name / f"{i}_7.txt").write_text(f"{split} {name} {i} " + "é" * 50)
    examples = LRA("text").sample(n=6, data=tmp_path, length=40, split="test")
    said = [e.ids[:-1].astype(np.uint8).tobytes() for e in examples]
    assert sorted(text[:10] for text in said) == sorted(f"test {n} {i}"[:10].encode() for n in ("neg", "pos") for i in range(3))
    assert all(len(text) == 40 and e.targets[-1] == (b"pos" in text) for text, e in zip(said, examples, strict=True))
    with pytest.raises(UsageError, match="was read from a file"):
        LRA("text").oracle(examples[0])


def test_reading_pairs_and_expressions(tmp_path):
    path = tmp_path / "new_aan_pairs.train.tsv"
    path.write_text("1.0\ta\tb\tfirst text\tsecond\n0.0\tc\td\tthird\tfourth text\n\n")
    examples = LRA("retrieval").sample(n=5, data=path, length=8)
    texts = {bytes(e.ids[e.ids < 256].tolist()): (e.ids.tolist(), e.targets[-1]) for e in examples}
    assert set(texts) == {b"first tesecond", b"thirdfourth t"} and texts[b"first tesecond"][1] == 1 and texts[b"thirdfourth t"][1] == 0
    assert texts[b"thirdfourth t"][0] == [*b"third", SEPARATOR, *b"fourth t", END]
    path.write_text("1.0\ta\tb\tfirst text\n")
    with pytest.raises(UsageError, match="line 1 of .* is no pair"):
        LRA("retrieval").sample(data=path)
    tree = tmp_path / "basic_train.tsv"
    tree.write_bytes(b"Source\tTarget\r\n( ( ( [MAX 2 ) 9 ) ] )\t9\r\n( ( ( [SM 5 ) 6 ) ] )\t1\r\n")
    lra = LRA()
    examples = lra.sample(n=4, data=tree)
    assert sorted(e.targets[-1] for e in examples) == [1, 1, 9, 9] and all(lra.score(e, lra.oracle(e)) for e in examples)
    assert examples[0].ids.tolist() in ([MAX, 2, 9, CLOSE, LIST_END], [SM, 5, 6, CLOSE, LIST_END])
    for line, says in ((b"[MAX 2 9 ]\tnine", "line 2 of"), (b"[MAX 2 q ]\t9", "word of a ListOps expression 'q'")):
        tree.write_bytes(b"Source\tTarget\n" + line + b"\n\n")
        with pytest.raises(UsageError, match=says):
            lra.sample(data=tree)


def test_reading_cifar_in_both_versions(tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(256, size=(5, 6, 3072)).astype(np.uint8), rng.integers(10, size=(5, 6))
    for kind in ("python", "binary"):
        (tmp_path / kind).mkdir()
    for i in range(5):
        (tmp_path / "python" / f"data_batch_{i + 1}").write_bytes(pickle.dumps({b"data": pixels[i], b"labels": labels[i].tolist()}))
        rows = np.concatenate([labels[i][:, None].astype(np.uint8), pixels[i]], 1)
        (tmp_path / "binary" / f"data_batch_{i + 1}.bin").write_bytes(rows.tobytes())
    first, second = (LRA("image").sample(n=30, data=tmp_path / kind) for kind in ("python", "binary"))
    assert all(np.array_equal(a.ids, b.ids) and np.array_equal(a.targets, b.targets) for a, b in zip(first, second, strict=True))
    grey, classes = cifar(tmp_path / "binary")
    assert grey.shape == (30, 1024) and np.array_equal(classes, labels.ravel())
    want = pixels.reshape(30, 3, 1024).transpose(0, 2, 1) @ np.array([0.299, 0.587, 0.114])
    assert abs(grey - want).max() <= 0.51
    assert sorted(map(int, (e.targets[-1] for e in first))) == sorted(labels.ravel().tolist()) and len(first[0].ids) == 1025
    with pytest.raises(UsageError, match="holds none of test_batch"):
        LRA("image").sample(data=tmp_path / "binary", split="test")


def test_a_pickle_that_runs_something_is_refused(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(UsageError, match="is no batch of CIFAR-10: .*print, and CIFAR-10 holds arrays alone"):
        LRA("image").sample(data=tmp_path)
    (tmp_path / "data_batch_1").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="is no batch of CIFAR-10"):
        LRA("image").sample(data=tmp_path)


def release(folder, side, counts, array=False, level=HARD):
    """Images as LRA has them, or with `array` as drewlinsley/pathfinder writes the metadata; returns {file: (pixels, class)} in order."""
    rng = np.random.default_rng(side)
    (folder / level / "metadata").mkdir(parents=True)
    made = {}
    for part, count in counts.items():
        (folder / level / "imgs" / str(part)).mkdir(parents=True)
        rows = []
        for i in range(count):
            pixels, label = rng.integers(256, size=(side, side), dtype=np.uint8), int(rng.integers(2))
            file = folder / level / "imgs" / str(part) / f"sample_{i}.png"
            Image.fromarray(pixels).save(file)
            rows.append([f"imgs/{part}", file.name, str(i), str(label), "1.0", "14", "4", "2", "0.5", "1", "1"])
            made[file] = (pixels, label)
        meta = folder / level / "metadata" / f"{part}.npy"
        if array:
            np.save(meta, np.array(rows))
        else:
            meta.write_text("".join(" ".join(row) + "\n" for row in rows))
    return made


@pytest.mark.parametrize("task", SIDES)
def test_reading_pathfinders(tmp_path, task):
    side = SIDES[task]
    made = release(tmp_path / f"pathfinder{side}", side, {0: 3, 2: 4, 10: 5} if side == 32 else {0: 2}, array=task == "path-x")
    lra = LRA(task)
    assert lra.labels == ("0", "1") and lra.chance == 0.5 and lra.vocab_size == PAD + 1
    for data in (tmp_path, tmp_path / f"pathfinder{side}", tmp_path / f"pathfinder{side}" / HARD):
        files = [pathfinder_files(data, side, split) for split in ("train", "val", "test")]
        assert [len(part) for part in files] == ([10, 1, 1] if side == 32 else [2, 0, 0])
        assert dict(sum(files, [])) == {path: label for path, (_, label) in made.items()}
    examples = lra.sample(n=len(files[0]), data=tmp_path)
    assert len(examples[0].ids) == side * side + 1 == {"pathfinder": 1025, "path-x": 16_385, "path-256": 65_537}[task]
    want = {pixels.tobytes(): label for path, (pixels, label) in made.items() if path in dict(files[0])}
    assert {e.ids[:-1].astype(np.uint8).tobytes(): int(e.targets[-1]) for e in examples} == want
    assert all(e.ids[-1] == END and (e.targets[:-1] == IGNORE).all() for e in examples)
    with pytest.raises(UsageError, match="was read from a file"):
        lra.oracle(examples[0])


def test_parity_the_split_is_that_of_torch(tmp_path):
    """S4's loader: the files by number and their lines in order, random_split with seed 42 into the rest, a tenth, a tenth."""
    made = list(release(tmp_path, 32, {10: 11, 9: 12}).items())
    made = [(path, label) for path, (_, label) in made[11:] + made[:11]]
    parts = torch.utils.data.random_split(made, [19, 2, 2], generator=torch.Generator().manual_seed(42))  # type: ignore[arg-type]
    for split, want in zip(("train", "val", "test"), parts, strict=True):
        assert pathfinder_files(tmp_path, 32, split) == [made[i] for i in want.indices]


def test_the_empty_image_of_the_release_is_left_out(tmp_path):
    level = EMPTY.split("/")[1]
    made = release(tmp_path / "pathfinder32", 32, {0: 174}, level=level)
    (tmp_path / EMPTY).write_bytes(b"")
    found = {path for split in ("train", "val", "test") for path, _ in pathfinder_files(tmp_path / "pathfinder32" / level, 32, split)}
    assert found == set(made) - {tmp_path / EMPTY}


def test_a_damaged_image_is_named(tmp_path):
    ((path, (pixels, _)),) = release(tmp_path, 32, {0: 1}).items()
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        try:
            assert np.array_equal(grey_png(path, 32), pixels.ravel()) and size > len(whole) - 20  # all but the end mark
        except UsageError as error:
            assert re.fullmatch(rf"{re.escape(str(path))} is truncated or is no image \(\w+\)\.", str(error))
    path.write_bytes(whole[:-40])
    with pytest.raises(UsageError, match="sample_0.png is truncated"):
        LRA("pathfinder").sample(n=1, data=tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match="sample_0.png does not exist; the metadata name it"):
        LRA("pathfinder").sample(n=1, data=tmp_path)
    Image.fromarray(pixels[:16]).save(path)
    with pytest.raises(UsageError, match="has 32 x 16 pixels; it must have 32 x 32"):
        LRA("pathfinder").sample(n=1, data=tmp_path)
    Image.merge("RGB", [Image.fromarray(pixels)] * 3).save(path)
    assert np.array_equal(grey_png(path, 32), pixels.ravel())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"imgs/0 sample_0.png 0 1 1.0\nimgs/0 sample_1.png\n", "line 2 of .*0.npy is 'imgs/0 sample_1.png'; it must be folder, file"),
        (b"imgs/0 sample_0.png 0 2 1.0\n", "line 1 of .*0.npy is"),
        (b"\n", "line 1 of .*0.npy is ''"),
        (b"\xff\xfe", "0.npy is no metadata of a pathfinder: UnicodeDecodeError"),
        (b"\x93NUMPY\x01\x00", "0.npy is no metadata of a pathfinder: ValueError"),
        (None, "0.npy is no metadata of a pathfinder: ValueError Object arrays cannot be loaded"),
        (b"", "holds no example"),
    ],
)
def test_metadata_that_do_not_parse_are_named(tmp_path, content, says):
    (tmp_path / HARD / "metadata").mkdir(parents=True)
    file = tmp_path / HARD / "metadata" / "0.npy"
    if content is None:
        np.save(file, np.array([["imgs/0", "sample_0.png", 0, 1]], object), allow_pickle=True)
    else:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=says) as error:
        LRA("pathfinder").sample(data=tmp_path)
    assert "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(UsageError, match="holds no metadata/0.npy, 1.npy .*; it must be LRA's folder pathfinder128"):
        LRA("path-x").sample(data=tmp_path)


def test_names_and_published_numbers():
    assert isinstance(rm.task("long-range-arena"), LRA) and {LRA(task).vocab_size for task in TASKS} == {17, 259}
    rows = {(row.model, row.setting.split(",")[0]): row.value for row in LRA.published}
    assert rows["Transformer", "ListOps"] == 36.37 and rows["S5", "Path-X"] == 98.58 and ("Transformer", "Path-X") not in rows


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "text"}, "the task 'text' needs data: IMDB's folder"),
        ({"task": "image", "data": "no_such_folder"}, "no_such_folder does not exist"),
        ({"task": "authors", "data": "here"}, "data is 'here'; the task 'authors' takes length and split alone"),
        ({"length": 100}, "the task 'listops' takes data and official alone"),
        ({"task": "authors", "length": 10**7}, "length is 10000000; the train parts of the novels have"),
        ({"task": "pathfinder-lite", "length": 1000}, "a square number of pixels"),
        ({"task": "pathfinder-lite", "length": 144}, "side=12"),
        ({"task": "authors", "split": "dev"}, "split is 'dev'"),
        ({"task": "authors", "split": "val"}, "split is 'val'; it may be 'train' or 'test'"),
        ({"task": "path-x"}, "the task 'path-x' needs data: LRA's folder pathfinder128"),
        ({"task": "path-x", "split": "dev", "data": "."}, "it may be 'train' or 'val' or 'test'"),
        ({"task": "path-256", "length": 64}, "the task 'path-256' takes data and split alone"),
        ({"task": "listop"}, "did you mean listops"),
        ({"official": True, "data": "a.tsv"}, "give one of them"),
        ({"depth": 3}, "option of lra"),
    ],
)
def test_bad_use_says_so_in_one_sentence(options, says):
    with pytest.raises(UsageError) as error:
        LRA().sample(**options)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("limits", [{"max_depth": 1}, {"max_args": 1}, {"min_length": 199}, {"max_depth": 2, "max_args": 2}, {"n": 0}])
def test_limits_that_allow_nothing(limits):
    with pytest.raises(UsageError):
        listops(np.random.default_rng(0), **({"n": 1} | limits))
