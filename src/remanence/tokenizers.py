"""Text to token ids and back: raw bytes, or byte-level BPE. Both give back every string, and encode endless text in bounded memory.

Ids 0..255 are the 256 bytes in both; the ids of merged tokens follow; the specials are the last three: pad, bos, eos. No text encodes to a
special: "<eos>" in a text is five ordinary characters.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tokenizers as library

from .errors import UsageError
from .files import write_text

FILE = "tokenizer.json"
FORMAT = 1
SPECIALS = ("<pad>", "<bos>", "<eos>")
LONGEST = 1 << 16
"""Characters that may pass without a safe place to cut before a text is cut anyway."""
BATCHED = 4096
"""Characters to gather before encoding, so that a stream of single characters does not encode them one by one."""

_LAST_SAFE = re.compile(r".*[ \n](?=\S)", re.DOTALL)

Pair = tuple[str, str]


class Tokenizer(ABC):
    """What every tokenizer does. `token_bytes` holds the bytes of each ordinary token, by id."""

    kind: ClassVar[str]

    def __init__(self, token_bytes: Sequence[bytes]):
        self.token_bytes = tuple(token_bytes)

    @property
    def vocab_size(self) -> int:
        """Ordinary tokens and specials."""
        return len(self.token_bytes) + len(SPECIALS)

    @property
    def pad(self) -> int:
        return len(self.token_bytes)

    @property
    def bos(self) -> int:
        return len(self.token_bytes) + 1

    @property
    def eos(self) -> int:
        return len(self.token_bytes) + 2

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text; no specials are added. Raises UsageError if the text has lone surrogates, which UTF-8 cannot hold."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the specials; bytes that are not UTF-8 become U+FFFD. Raises UsageError on an id out of range."""
        parts = []
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise UsageError(f"token id {i} is out of range; this tokenizer has ids 0 to {self.vocab_size - 1}.")
            if i < self.pad:
                parts.append(self.token_bytes[i])
        return b"".join(parts).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write `folder`/tokenizer.json, whole or not at all. Raises FileError if it cannot be written."""
        content = {"format": FORMAT, "kind": self.kind, **self._content()}
        write_text(Path(folder) / FILE, json.dumps(content, ensure_ascii=False))

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """What the file holds beyond its kind."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8: ids 0..255, pad 256, bos 257, eos 258; vocab_size 259."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([byte]) for byte in range(256)])

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def _content(self) -> dict[str, Any]:
        return {}


class BPETokenizer(Tokenizer):
    """Byte-level BPE: words and punctuation are split as GPT-2 does, then bytes merge in the order of `merges`.

    merges: pairs of symbols, each a string over the 256 printable stand-ins for bytes. ids: bytes 0..255, then one per different merged
    symbol in order, then pad, bos, eos. No space is put before a text.
    """

    kind = "bpe"

    def __init__(self, merges: Sequence[Pair]):
        self.merges = tuple(merges)
        vocab = _vocabulary(self.merges)
        super().__init__([bytes(_BYTE_OF[symbol] for symbol in token) for token in vocab])
        self._library = library.Tokenizer(library.models.BPE(vocab=vocab, merges=list(self.merges)))
        self._library.pre_tokenizer = _pre_tokenizer()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 4096, words: Sequence[str] = ()) -> BPETokenizer:
        """Learn merges from texts; `vocab_size` counts everything and is reached unless the texts are too small for it.

        words: each becomes one token with the space before it ("garden" and " garden" both ask for " garden"), whether or not the texts
        contain it. Raises UsageError if a word is not one run of letters, of digits or of punctuation, or if `vocab_size` is too small.
        """
        if isinstance(texts, str):
            raise UsageError("texts is one string; it must be a list (or another iterable) of strings.")
        wanted = [_as_symbols(word) for word in dict.fromkeys(" " + word.strip() for word in words)]
        room = vocab_size - len(SPECIALS) - 256
        if room < 0:
            raise UsageError(f"vocab_size is {vocab_size}; it must be at least {256 + len(SPECIALS)}: every byte and the specials.")

        learned = _learn(texts, 256 + room)
        keep = len(learned)
        # Words take their places from the last, least useful merges; dropping those may cut a word into more parts, hence the loop.
        while (excess := len(_vocabulary(merges := _with_words(learned[:keep], wanted))) - 256 - room) > 0:
            if keep == 0:
                raise UsageError(f"vocab_size is {vocab_size}; with these {len(wanted)} words it must be at least {vocab_size + excess}.")
            keep = max(0, keep - excess)

        tokenizer = cls(merges)
        for word in words:
            if len(tokenizer.encode(" " + word.strip())) != 1:
                raise UsageError(f"the word {word!r} could not be made one token.")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        if len(text) <= LONGEST:
            return self._encode([text])[0]
        return [i for ids in self._encode(list(_segments([text]))) for i in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(len(text) > LONGEST for text in texts):
            return super().encode_batch(texts)
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                _utf8(text)
            raise

    def _content(self) -> dict[str, Any]:
        return {"sha256": _digest(self.merges), "merges": [list(pair) for pair in self.merges]}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `save` wrote in `folder`. Raises UsageError if the file is missing, damaged or of another program or version."""
    path = Path(folder) / FILE
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} does not exist; it must be a folder where a tokenizer was saved.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is damaged: it is not JSON.") from None
    if not isinstance(content, Mapping) or content.get("kind") not in (ByteTokenizer.kind, BPETokenizer.kind):
        raise UsageError(f"{path} is not a tokenizer of this library; its kind must be 'byte' or 'bpe'.")
    if content.get("format") != FORMAT:
        raise UsageError(f"{path} has format {content.get('format')!r}; this version reads format {FORMAT}.")
    if content["kind"] == ByteTokenizer.kind:
        return ByteTokenizer()
    try:
        merges = [(str(left), str(right)) for left, right in content["merges"]]
        intact = _digest(merges) == content["sha256"]
        if intact:
            return BPETokenizer(merges)
    except Exception:
        # The library raises bare Exception on a merge of symbols that it does not know.
        pass
    raise UsageError(f"{path} is damaged: its merges are not those that were saved.")


def stream_encode(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Encode text that arrives in pieces of any size, an endless one too, in bounded memory.

    The lists joined are `tokenizer.encode` of the whole text, however it was cut into pieces.
    """
    for segment in _segments(pieces):
        if ids := tokenizer.encode(segment):
            yield ids


def _segments(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in segments of at most LONGEST characters that can be encoded apart.

    A cut falls before a space or line end that a visible character follows: both sides are split there into the words that the whole is.
    Where LONGEST characters hold no such place the cut is after LONGEST of them, which depends on the text and not on its pieces.
    """
    held: list[str] = []
    length = 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length < BATCHED:
            continue
        text = "".join(held)
        start = 0
        while cut := _cut(text, start):
            yield text[start:cut]
            start = cut
        held, length = [text[start:]], 0
    text = "".join(held)
    start = 0
    while len(text) - start > LONGEST:
        cut = _cut(text, start)
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _cut(text: str, start: int) -> int:
    """The last safe place in the LONGEST characters from `start`; where there is none, their end if the text goes on, else 0."""
    if found := _LAST_SAFE.match(text, start + 1, start + LONGEST + 1):
        return found.end() - 1
    return start + LONGEST if len(text) - start > LONGEST else 0


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the text has a lone surrogate at character {error.start}; text must be encodable as UTF-8.") from None


def _pre_tokenizer() -> library.pre_tokenizers.ByteLevel:
    return library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _stand_ins() -> list[str]:
    """GPT-2's printable character for each byte: itself where it is visible, else the next free one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(free)) for byte in range(256)]


_SYMBOL = _stand_ins()
_BYTE_OF = {symbol: byte for byte, symbol in enumerate(_SYMBOL)}


def _vocabulary(merges: Iterable[Pair]) -> dict[str, int]:
    """Token -> id: the bytes, then each different result of a merge."""
    tokens = dict.fromkeys([*_SYMBOL, *(left + right for left, right in merges)])
    return {token: i for i, token in enumerate(tokens)}


def _digest(merges: Iterable[Pair]) -> str:
    return hashlib.sha256(json.dumps([list(pair) for pair in merges]).encode()).hexdigest()


def _as_symbols(word: str) -> list[str]:
    """The symbols of a word that can be one token; merges never cross the splits that the pre-tokenizer makes."""
    _utf8(word)
    if word == " " or len(_pre_tokenizer().pre_tokenize_str(word)) != 1:
        raise UsageError(f"the word {word.strip()!r} cannot be one token; it must be one run of letters, of digits or of punctuation.")
    return [_SYMBOL[byte] for byte in word.encode("utf-8")]


def _learn(texts: Iterable[str], size: int) -> list[Pair]:
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = _pre_tokenizer()
    trainer = library.trainers.BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=_SYMBOL, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(trained.to_str())["model"]["merges"]]


def _with_words(merges: Sequence[Pair], words: Iterable[list[str]]) -> list[Pair]:
    """Merges that also make each word one token.

    New merges go last. The last merge applies only where no other can, so it changes no word that is one token already, and it shortens
    the word that it was added for.
    """
    merges = list(merges)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for word in words:
        while len(parts := _merge(word, ranks)) > 1:
            pair = (parts[0], parts[1])
            ranks[pair] = len(merges)
            merges.append(pair)
    return merges


def _merge(parts: Sequence[str], ranks: Mapping[Pair, int]) -> list[str]:
    """BPE of one word: join the adjacent pair that was learned first, leftmost first, until none is left."""
    parts = list(parts)
    while len(parts) > 1:
        rank, at = min((ranks.get((parts[i], parts[i + 1]), len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
