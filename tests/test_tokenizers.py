"""Tokenizers give back every string, keep chosen words whole, and encode a stream as they encode the whole."""

from __future__ import annotations

import itertools
import json
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence import tokenizers
from remanence.corpus import training_texts
from remanence.errors import FileError, UsageError
from remanence.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, stream_encode

WORDS = [" garden", "Mary", "xylophonist", "bathroom", "42", "Ångström", "!?"]
text = st.text(st.characters(exclude_categories=["Cs"]))
spaced = st.text(st.sampled_from("ab'sé1., \n\t\r\u00a0\u2028\x1c\U0001f600"))


@lru_cache(maxsize=1)
def bpe() -> BPETokenizer:
    return BPETokenizer.train([training_texts()["pride_and_prejudice"][:100_000]], vocab_size=800, words=WORDS)


def both() -> list[Tokenizer]:
    return [ByteTokenizer(), bpe()]


def cut(whole: str, places: list[int]) -> list[str]:
    ends = [0, *sorted(place % (len(whole) + 1) for place in places), len(whole)]
    return [whole[start:end] for start, end in itertools.pairwise(ends)]


@given(text | spaced)
def test_round_trip(s: str) -> None:
    for tokenizer in both():
        ids = tokenizer.encode(s)
        assert tokenizer.decode(ids) == s
        assert all(0 <= i < tokenizer.pad for i in ids)


@given(st.lists(text, max_size=4))
def test_batch_equals_rows(texts: list[str]) -> None:
    for tokenizer in both():
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(s) for s in texts]


def test_specials_are_last_and_never_come_from_text() -> None:
    for tokenizer in both():
        assert [tokenizer.pad, tokenizer.bos, tokenizer.eos] == list(range(tokenizer.vocab_size - 3, tokenizer.vocab_size))
        assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("<eos>"), tokenizer.eos, tokenizer.pad]) == "<eos>"


def test_byte_ids() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.pad, tokenizer.bos, tokenizer.eos) == (259, 256, 257, 258)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert bpe().encode("\x00\x01") == [0, 1]


def test_broken_bytes_and_bad_ids() -> None:
    for tokenizer in both():
        assert tokenizer.decode([0x61, 0xC3]) == "a\ufffd"
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(UsageError, match="out of range"):
                tokenizer.decode([bad])
        for refused in (lambda t: t.encode("a\ud800"), lambda t: t.encode_batch(["", "a\ud800"])):
            with pytest.raises(UsageError, match="surrogate at character 1"):
                refused(tokenizer)


@pytest.mark.parametrize("word", WORDS)
def test_words_are_single_tokens(word: str) -> None:
    assert len(bpe().encode(" " + word.strip())) == 1
    assert len(bpe().encode(f"The {word.strip()}.")) == len(bpe().encode("The")) + 1 + len(bpe().encode("."))


@given(st.lists(st.text("abcdeé", min_size=1, max_size=12), min_size=1, max_size=30))
@settings(max_examples=30)
def test_any_words_fit_beside_learned_merges(words: list[str]) -> None:
    tokenizer = BPETokenizer.train(["abba cde " * 20, "bead decade abed " * 9], vocab_size=700, words=words)
    assert all(len(tokenizer.encode(" " + word)) == 1 for word in words)
    assert tokenizer.vocab_size <= 700


def test_vocab_size_is_exact_and_training_repeats() -> None:
    assert bpe().vocab_size == 800
    texts = [training_texts()["pride_and_prejudice"][:20_000]]
    assert BPETokenizer.train(texts, 400, ["zebra"]).merges == BPETokenizer.train(iter(texts), 400, ["zebra"]).merges
    assert BPETokenizer.train([], vocab_size=259).vocab_size == 259


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "one string"}, "must be a list"),
        ({"texts": [], "vocab_size": 258}, "at least 259"),
        ({"texts": [], "vocab_size": 260, "words": ["garden"]}, "at least 265"),
        ({"texts": [], "words": ["two words"]}, "'two words' cannot be one token"),
        ({"texts": [], "words": ["a1"]}, "cannot be one token"),
        ({"texts": [], "words": [" "]}, "cannot be one token"),
    ],
)
def test_training_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BPETokenizer.train(**arguments)


@given(text | spaced, st.lists(st.integers(0, 1000), max_size=8), st.integers(1, 40), st.integers(1, 40))
def test_stream_does_not_depend_on_cuts(whole: str, places: list[int], longest: int, batched: int) -> None:
    made = both()  # before the limits are lowered, because training encodes too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "LONGEST", longest)
        patch.setattr(tokenizers, "BATCHED", batched)
        for tokenizer in made:
            streamed = [i for ids in stream_encode(tokenizer, cut(whole, places)) for i in ids]
            assert streamed == tokenizer.encode(whole)
            assert tokenizer.decode(streamed) == whole


@given(spaced, st.integers(1, 10))
def test_safe_cuts_change_nothing(whole: str, batched: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "BATCHED", batched)
        assert [i for ids in stream_encode(bpe(), whole) for i in ids] == bpe().encode(whole)


def test_stream_of_a_book() -> None:
    whole = training_texts()["dracula"][:300_000] + "x" * 200_000 + " " * 100_000 + "end"
    expected = bpe().encode(whole)
    assert bpe().decode(expected) == whole
    for size in (1, 997, 150_000):
        pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
        assert [i for ids in stream_encode(bpe(), pieces) for i in ids] == expected


def test_stream_holds_a_bounded_amount() -> None:
    given_out = 0

    def endless():
        nonlocal given_out
        for _ in itertools.count():
            given_out += 1000
            yield "x" * 1000

    done = 0
    for ids in itertools.islice(stream_encode(ByteTokenizer(), endless()), 20):
        done += len(ids)
        assert given_out - done <= 2 * tokenizers.LONGEST


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_save_and_load(kind: str, tmp_path) -> None:
    tokenizer = dict(zip(["byte", "bpe"], both(), strict=True))[kind]
    tokenizer.save(tmp_path / "new")
    loaded = load_tokenizer(tmp_path / "new")
    sample = training_texts()["dracula"][5000:9000] + " garden Ångström \U0001f600"
    assert type(loaded) is type(tokenizer)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(sample) == tokenizer.encode(sample)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["tokenizer.json"]


def test_save_where_it_cannot(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError):
        ByteTokenizer().save(tmp_path / "file")


def test_missing_and_damaged_files(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UsageError, match="does not exist"):
        load_tokenizer(tmp_path)
    bpe().save(tmp_path)
    good = path.read_text(encoding="utf-8")
    content = json.loads(good)
    swapped = {**content, "merges": content["merges"][::-1]}
    unknown = [["no", "such"]]
    damaged = {
        "not JSON": [good[: len(good) // 2], "", "\x00\xff"],
        "not a tokenizer of this library": ["[]", "null", "{}", '{"version": "1.0", "model": {}}', '{"kind": ["byte"]}'],
        "reads format 1": ['{"kind": "byte"}', '{"kind": "bpe", "format": 2}'],
        "merges are not those": [
            json.dumps(swapped),
            json.dumps({**content, "merges": unknown, "sha256": tokenizers._digest([("no", "such")])}),
            json.dumps({**content, "merges": 3}),
            '{"kind": "bpe", "format": 1}',
        ],
    }
    for message, files in damaged.items():
        for file in files:
            path.write_text(file, encoding="utf-8")
            with pytest.raises(UsageError, match=message):
                load_tokenizer(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UsageError):
        load_tokenizer(tmp_path)
