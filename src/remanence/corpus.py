"""Text: files of any size, and the four novels that the package ships."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

from .errors import UsageError, positive

HAYSTACK = "moby_dick"
TRAINING = ("great_expectations", "pride_and_prejudice", "dracula")
READ_BYTES = 1 << 20


def load_text(path: str | Path) -> str:
    """The whole text of a UTF-8 file, or of a gzipped one whose name ends in .gz. Line ends are kept; a byte order mark is dropped.

    Raises UsageError if the file is missing, a folder, unreadable, empty, not UTF-8 (with the offset of the first bad byte) or not gzip.
    """
    return "".join(iter_text(path))


def iter_text(path: str | Path, chunk_chars: int = 1 << 20) -> Iterator[str]:
    """The text of a file in pieces of `chunk_chars` characters (the last may be shorter), in memory that does not grow with the file.

    Its pieces joined are `load_text(path)`. Raises the same errors: the file is opened, and found missing or empty, by this call; a bad
    byte is reported when the reading reaches it.
    """
    positive(chunk_chars=chunk_chars)
    pieces = _decode(Path(path))
    first = next(pieces, None)
    if first is None:
        raise UsageError(f"{path} is empty; it must hold some text.")
    return _regroup(first, pieces, chunk_chars)


@lru_cache(maxsize=1)
def default_haystack() -> str:
    """Moby-Dick: the text in which the retrieval tasks hide their facts unless given another."""
    return _packaged(HAYSTACK)


def training_texts() -> dict[str, str]:
    """The shipped books that are not the haystack, by name: what the shipped checkpoint and tokenizer learn from."""
    return {name: _packaged(name) for name in TRAINING}


def folder_texts(path: str | Path) -> dict[str, str]:
    """Every *.txt file in a folder (not in its subfolders), sorted by name: file name without .txt -> text.

    Raises UsageError if the folder is missing, is a file or holds no .txt file, and what `load_text` raises for each file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{path} {'is a file' if folder.exists() else 'does not exist'}; it must be a folder with .txt files.")
    found = sorted(file for file in folder.glob("*.txt") if file.is_file())
    if not found:
        raise UsageError(f"{path} holds no .txt file; it must hold at least one.")
    return {file.stem: load_text(file) for file in found}


def _packaged(name: str) -> str:
    return load_text(Path(__file__).parent / "data" / f"{name}.txt.gz")


def _open(path: Path) -> BinaryIO:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; it must be a text file.")
    try:
        return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; it must be a text file.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None


def _decode(path: Path) -> Iterator[str]:
    """The non-empty decoded pieces of a file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start, at_start = 0, True
    with _open(path) as file:
        while True:
            try:
                data = file.read(READ_BYTES)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UsageError(f"{path} is not a whole gzip file: {error}.") from None
            except OSError as error:
                raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
            held = len(decoder.getstate()[0])
            try:
                piece = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                offset = start - held + error.start
                raise UsageError(f"{path} is not UTF-8: the byte at offset {offset} is 0x{error.object[error.start]:02x}.") from None
            start += len(data)
            if at_start and piece:
                piece, at_start = piece.removeprefix("\ufeff"), False
            if piece:
                yield piece
            if not data:
                return


def _regroup(first: str, rest: Iterator[str], size: int) -> Iterator[str]:
    """The same text in pieces of exactly `size` characters, but for the last."""
    held, length = [first], len(first)
    while True:
        if length >= size:
            text = "".join(held)
            end = length - length % size
            for start in range(0, end, size):
                yield text[start : start + size]
            held, length = [text[end:]], length - end
        piece = next(rest, None)
        if piece is None:
            break
        held.append(piece)
        length += len(piece)
    if length:
        yield "".join(held)
