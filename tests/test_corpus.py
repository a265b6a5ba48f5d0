"""Reading text: the packaged books, files of any size, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remanence
from remanence import corpus
from remanence.corpus import default_haystack, folder_texts, iter_text, load_text, training_texts
from remanence.errors import UsageError

DATA = Path(remanence.__file__).parent / "data"
BAD = {
    "missing.txt": (None, "does not exist"),
    "missing.txt.gz": (None, "does not exist"),
    "empty.txt": (b"", "is empty"),
    "mark.txt": (b"\xef\xbb\xbf", "is empty"),
    "empty.txt.gz": (gzip.compress(b""), "is empty"),
    "latin.txt": (b"caf\xe9 noir", "not UTF-8: the byte at offset 3 is 0xe9"),
    "half.txt": ("naïve é".encode()[:-1], "not UTF-8: the byte at offset 7 is 0xc3"),
    "bad.txt.gz": (gzip.compress(b"ab\xff"), "not UTF-8: the byte at offset 2 is 0xff"),
    "plain.txt.gz": (b"not gzip at all", "not a whole gzip file"),
    "cut.txt.gz": (gzip.compress(bytes(range(97, 120)) * 100)[:-12], "not a whole gzip file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read(name: str, tmp_path) -> None:
    data, message = BAD[name]
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    for read in (load_text, lambda p: list(iter_text(p, 3)), lambda p: load_text(str(p))):
        with pytest.raises(UsageError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_a_folder_is_not_a_text(tmp_path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        load_text(tmp_path)


def test_errors_come_before_the_first_piece(tmp_path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        iter_text(tmp_path / "missing")
    (tmp_path / "text").write_text("x")
    with pytest.raises(UsageError, match="chunk_chars"):
        iter_text(tmp_path / "text", 0)


@given(st.text("aé€\U0001f600\r\n", min_size=1, max_size=60), st.integers(1, 70), st.integers(1, 9))
def test_pieces_join_to_the_whole(tmp_path_factory, text: str, chunk: int, read_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_bytes(text.encode())
    (folder / "text.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "READ_BYTES", read_bytes)
        for name in ("text.txt", "text.gz"):
            pieces = list(iter_text(folder / name, chunk))
            assert "".join(pieces) == load_text(folder / name) == text
            assert all(len(piece) == chunk for piece in pieces[:-1])
            assert 0 < len(pieces[-1]) <= chunk


@given(st.integers(0, 40), st.integers(1, 9))
def test_the_offset_of_a_bad_byte(tmp_path_factory, before: int, read_bytes: int) -> None:
    path = tmp_path_factory.mktemp("text") / "text"
    good = ("€é" * before).encode()
    path.write_bytes(good + b"\xe2\x82" + b"abc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "READ_BYTES", read_bytes)
        with pytest.raises(UsageError, match=f"offset {len(good)} is 0xe2"):
            load_text(path)


def test_a_byte_order_mark_is_dropped(tmp_path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfhello")
    assert load_text(tmp_path / "text") == "hello"


def test_folder_texts(tmp_path) -> None:
    with pytest.raises(UsageError, match="no .txt file"):
        folder_texts(tmp_path)
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert list(folder_texts(tmp_path).items()) == [("a", "a.txt"), ("b", "b.txt")]
    for path, message in ((tmp_path / "a.txt", "is a file"), (tmp_path / "no", "does not exist")):
        with pytest.raises(UsageError, match=message):
            folder_texts(path)


def test_packaged_books_are_whole_and_only_the_authors() -> None:
    books = {"moby_dick": default_haystack(), **training_texts()}
    assert sorted(books) == ["dracula", "great_expectations", "moby_dick", "pride_and_prejudice"]
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for name, text in books.items():
        assert len(text.encode()) >= 500_000
        assert hashlib.sha256(text.encode()).hexdigest() in readme, name
        assert not re.search("gutenberg|transcriber|\\betext|illustration:|\r|  |_[a-z]", text.lower())
        assert all(line.strip() == line for line in text.split("\n"))
    assert default_haystack() is default_haystack()
    assert "Call me Ishmael." in books["moby_dick"]
