"""Pack the public-domain books that the package ships: `python tools/pack_books.py SOURCE_FOLDER OUTPUT_FOLDER`.

Each book keeps its title, its author and its text. Front matter (imprint, contents, credits) and end matter (advertisements, notes of
the transcribers) go, hard-wrapped lines become one line per paragraph, and the marks of italics disappear. The output is the same bytes
every time.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Book:
    """Where a book's text lies in its source: from the last line that equals `first` to the line before `after` (or to the end)."""

    slug: str
    title: str
    author: str
    year: int
    use: str
    first: str
    after: str | None = None


BOOKS = (
    Book("moby_dick", "Moby-Dick; or, The Whale", "Herman Melville", 1851, "default haystack", first="ETYMOLOGY."),
    Book("great_expectations", "Great Expectations", "Charles Dickens", 1861, "training text", first="Chapter I"),
    Book("pride_and_prejudice", "Pride and Prejudice", "Jane Austen", 1813, "training text", first="Chapter 1"),
    Book("dracula", "Dracula", "Bram Stoker", 1897, "training text", first="CHAPTER I", after="THE END"),
)
NOT_THE_AUTHORS = re.compile(r"gutenberg|\betext|transcriber|\[illustration|colophon|all rights reserved|proofread", re.IGNORECASE)


def clean(source: str, book: Book) -> str:
    """The text of `book` alone, one line per paragraph, a blank line between paragraphs. Raises ValueError if a foreign line is left."""
    lines = [line.strip() for line in source.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    start = len(lines) - 1 - lines[::-1].index(book.first)
    end = lines.index(book.after, start) if book.after else len(lines)
    paragraphs = re.split(r"\n{2,}", "\n".join(lines[start:end]).strip())
    # An underscore before a brace is a subscript (a chemical formula), not italics.
    body = [re.sub(r"_(?!\{)", "", re.sub(r"\s+", " ", paragraph)).strip() for paragraph in paragraphs]
    text = "\n\n".join([book.title, f"by {book.author}", *(paragraph for paragraph in body if paragraph)]) + "\n"
    if foreign := NOT_THE_AUTHORS.search(text):
        raise ValueError(f"{book.slug}: {text[max(0, foreign.start() - 40) : foreign.end() + 40]!r} is not the author's text.")
    return text


def pack(source: Path, output: Path) -> None:
    """Write `<slug>.txt.gz` for every book, and the README.md that describes them."""
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for book in BOOKS:
        text = clean((source / f"{book.slug}.txt").read_text(encoding="utf-8"), book)
        data = text.encode("utf-8")
        with open(output / f"{book.slug}.txt.gz", "wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as packed:
            packed.write(data)
        digest = hashlib.sha256(data).hexdigest()
        rows.append(f"| `{book.slug}.txt.gz` | {book.title} | {book.author} | {book.year} | {book.use} | {len(text):,} | `{digest}` |")
    (output / "README.md").write_text(README + "\n".join(rows) + "\n", encoding="utf-8")


README = """# Packaged texts

Four novels in the public domain, written by `tools/pack_books.py`: title, author and text, one line per paragraph, UTF-8, gzip.
`remanence.corpus` reads them. The sha256 and the number of characters are those of the text, not of the compressed file.

| file | title | author | year | use | characters | sha256 of the text |
|---|---|---|---|---|---|---|
"""


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: pack_books.py SOURCE_FOLDER OUTPUT_FOLDER")
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
