"""Translation: the synthetic languages, parallel files, BLEU, recalled names, the paper's models, beam search."""

import itertools
import math
from hashlib import sha256

import numpy as np
import pytest
import torch

import remanence as rm
from helpers import assert_close
from remanence.errors import ShapeError, UsageError
from remanence.inference.beam import beam_search, translate
from remanence.models import Decoder
from remanence.models.encdec import EncoderDecoder
from remanence.span import Span
from remanence.state import State
from remanence.tasks.base import IGNORE
from remanence.tasks.ssm_mt import (
    EOS,
    FIRST,
    MODELS,
    PIECES,
    SEP,
    SSMMT,
    STOP,
    WORDS,
    Pair,
    batch,
    bleu,
    concatenated,
    dictionary,
    encoded,
    mt_config,
    names_of,
    read_parallel,
    recall_by,
    tokens_13a,
)


def test_the_pairs_of_a_seed_never_change():
    arrays = batch(np.random.default_rng(3), 4, 12, sentences=2)
    assert sha256(b"".join(a.astype("<i8").tobytes() for a in arrays)).hexdigest()[:16] == "1aff5e009c7afed3"


def test_layout_the_oracle_and_chance():
    task, rng = SSMMT(), np.random.default_rng(0)
    assert isinstance(rm.task("ssm-mt"), SSMMT) and task.vocab_size == FIRST + PIECES + 2 * WORDS
    may = np.r_[EOS, STOP, FIRST : FIRST + PIECES + WORDS]
    hits = scored = 0
    for length, sentences in ((2, 1), (16, 1), (9, 5), (64, 2)):
        for e in task.sample(seed=1, n=40, length=length, sentences=sentences):
            at = length * sentences
            source, target = task.sides(e)
            assert e.ids[at] == SEP and e.ids[-1] == EOS and len(source) == len(target) == at and len(e.ids) == 2 * at + 2
            assert (e.targets[:at] == IGNORE).all() and np.array_equal(e.targets[at:-1], e.ids[at + 1 :]) and e.targets[-1] == IGNORE
            assert (source[length - 1 :: length] == STOP).all() and (target[length - 1 :: length] == STOP).all()
            assert set(e.targets[at:-1].tolist()) <= set(may.tolist()) and e.ids.max() < task.vocab_size
            assert task.score(e, task.oracle(e)) and task.accuracy(e, task.oracle(e)) == 1
            assert np.array_equal(task.prompt(e), e.ids[: at + 1])
            guess = rng.choice(may, at + 1)
            hits, scored = hits + (guess == task.oracle(e)).sum(), scored + at + 1
    assert task.chance == 1 / len(may) and abs(hits - scored * task.chance) < 4.5 * (scored * task.chance) ** 0.5


def test_the_rules_of_the_language_by_hand():
    """64 words, 16 of them modifiers: words w(i), names of pieces p(i)."""
    task, new = SSMMT(), dictionary()
    assert sorted(new.tolist()) == list(range(WORDS)) and not np.array_equal(new, dictionary(language=1))
    w, v, p = (lambda i: FIRST + PIECES + WORDS + i), (lambda i: FIRST + PIECES + int(new[i])), (lambda i: FIRST + i)
    said = [w(3), w(20), w(1), w(2), p(4), p(5), w(30), w(0), STOP]
    want = [v(20), v(3), v(1), p(4), p(5), v(2), v(30), v(0), STOP, EOS]
    e = task.sample(n=1, length=9)[0]
    e = type(e)(np.array([*said, SEP, *want]), e.targets)
    assert task.oracle(e).tolist() == want
    ids, _ = batch(np.random.default_rng(0), 400, 32)
    name = (ids[:, :31] >= FIRST) & (ids[:, :31] < FIRST + PIECES)
    assert 0.15 < name.mean() < 0.3 and name[:, 0].any()  # 0.15 / 1.15 of the units, two tokens each


def test_parity_bleu_known_values():
    """The two-reference example of sacrebleu's manual; a sentence and a corpus of NLTK's; and by hand."""
    said = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    refs = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    assert abs(bleu(said, refs, own=True) - 48.530827) < 1e-5
    one = "It is a guide to action which ensures that the military always obeys the commands of the party"
    three = [
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being under the command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    ]
    two, ref = "he read the book because he was interested in world history", "he was interested in world history because he read the book"
    assert abs(bleu([one], [three], "none", own=True) - 50.45666840058485) < 1e-9
    assert abs(bleu([one, two], [three, [ref]], "none", own=True) - 59.20778868801042) < 1e-9
    assert bleu(["a b c d"], ["a b c d"]) == pytest.approx(100) and bleu(["a b c"], ["a b c"], own=True) == 0
    # One of one four-gram, 2 of 2, ... but half as long: the brevity penalty alone.
    assert bleu(["a b c d"], ["a b c d e f g h"], own=True) == pytest.approx(100 * math.exp(-1))
    # "exp": 4 of 5, 2 of 4, none of 3 (1/2), none of 2 (1/4).
    want = 100 * (4 / 5 * 2 / 4 * 1 / 6 * 1 / 8) ** 0.25
    assert bleu(["a b x d e"], ["a b c d e"], own=True) == pytest.approx(want)
    words = ["Say", '"', "3,141.5", '"', ",", "&", "2", "-", "3", "(", "or", "x-y", ")", *"..."]
    assert tokens_13a('Say "3,141.5", &amp; 2-3 (or x-y)...') == words


def test_parity_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    rng, marks = np.random.default_rng(0), ["a", "b", "The", "cat", "3.5", "it's", "x-y", "end.", "(so)", '"q",', "&amp;", "1-2", "é"]
    for _ in range(20):
        refs = [" ".join(rng.choice(marks, rng.integers(1, 12))) for _ in range(5)]
        said = [" ".join(w for w in ref.split() if rng.random() < 0.8) for ref in refs]
        assert abs(sacrebleu.corpus_bleu(said, [refs]).score - bleu(said, refs, own=True)) < 1e-9
        several = [[ref, *refs[:i]] for i, ref in enumerate(refs)]
        assert abs(bleu(said, several) - bleu(said, several, own=True)) < 1e-9
        assert abs(bleu(said, several, "none") - bleu(said, several, "none", own=True)) < 1e-9


def test_reading_parallel_files(tmp_path):
    one, two, tsv = tmp_path / "a.de", tmp_path / "a.en", tmp_path / "a.tsv"
    one.write_bytes("Hallo Welt.\r\n\nFrau Schmidt\u2028 wohnt in Rom .\nGut.\n".encode())
    two.write_text("Hello world.\n\nMs Schmidt lives in Rom .\nFine.")
    pairs = read_parallel(one, two)
    assert pairs == [("Hallo Welt.", "Hello world."), ("Frau Schmidt\u2028 wohnt in Rom .", "Ms Schmidt lives in Rom ."), ("Gut.", "Fine.")]
    tsv.write_text("".join(f"{a}\t{b}\n" for a, b in pairs) + "\n")
    assert read_parallel(tsv) == pairs
    assert concatenated(pairs, 2) == [(f"{pairs[0][0]} {pairs[1][0]}", f"{pairs[0][1]} {pairs[1][1]}"), pairs[2]]
    task = SSMMT(data=(one, two))
    examples = task.sample(n=4, sentences=2)
    assert len({e.ids.tobytes() for e in examples}) == 2 and task.vocab_size == task.base + 5 and task.base >= 256
    e = encoded(pairs[2])
    assert e.ids.tolist() == [*b"Gut.", task.base + SEP, *b"Fine.", task.base + EOS]
    assert e.targets.tolist() == [*[IGNORE] * 4, *b"Fine.", task.base + EOS, IGNORE]
    assert task.text([*b"Fine.", task.base + EOS, 9]) == "Fine." and [len(e.ids) for e in task.sample(n=2, length=12)] == [11, 11]
    for e in examples:
        (row,) = task.report([e], [e.ids[len(task.prompt(e)) :]])
        assert row.exact == 1 and row.bleu == pytest.approx(100 if row.n and len(row_words(task, e)) > 3 else row.bleu)
    with pytest.raises(UsageError, match="was read from a file"):
        task.oracle(examples[0])
    with pytest.raises(UsageError, match="length is 3; every example"):
        task.sample(length=3)


def row_words(task, e):
    return task.text(task.sides(e)[1]).split()


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        (b"a\nb\n", b"c\n", "has 2 lines and .* 1; line by line"),
        (b"a\nb\n", b"c\n\n", "line 2 of .*two has no target"),
        (b"\nb\n", b"c\nd\n", "line 1 of .*one has no source"),
        (b"\xff\n", b"c\n", "one is no UTF-8 text"),
        (b"", b"", "holds no pair"),
        (b"a", None, "two does not exist"),
        (b"a\tb\nc\n", "tsv", "line 2 of .*one has 1 columns; it must be a source, a tab and a target"),
        (b"a\tb\nc\t\n", "tsv", "line 2 of .*one has no target"),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path, one, two, says):
    (tmp_path / "one").write_bytes(one)
    if isinstance(two, bytes):
        (tmp_path / "two").write_bytes(two)
    with pytest.raises(UsageError, match=says) as error:
        SSMMT(data=tmp_path / "one" if two == "tsv" else (tmp_path / "one", tmp_path / "two"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 1}, "length=1"),
        ({"sentences": 0}, "sentences is 0"),
        ({"turns": 2}, "option of ssm-mt"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_bad_use_says_so(options, says):
    with pytest.raises(UsageError, match=says):
        SSMMT().sample(**options)
    for call in (
        lambda: bleu(["a"], []), lambda: bleu("a", ["a"]), lambda: bleu(["a"], ["a"], "intl"), lambda: SSMMT(pieces=0),
        lambda: mt_config("gru", 9), lambda: mt_config("mamba", 9, where="late"), lambda: mt_config("mamba-mha", 9, where="top"),
        lambda: SSMMT().report([], [[1]]), lambda: SSMMT().report([], [], (3, 1)), lambda: SSMMT(words=3).sample(),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            call()


def test_names_and_what_is_recalled_by_length():
    target = "There Anna Meier met Kant in Rom, Paris and Cologne. Rom is."
    found = names_of(Pair("Anna Meier traf I. Kant in Rom, Paris und Köln.", target))
    assert found == {"Anna Meier", "Kant", "Rom", "Paris"}
    task = SSMMT()
    examples = [*task.sample(seed=0, n=20, length=10), *task.sample(seed=1, n=20, length=40)]
    outputs = [task.oracle(e) for e in examples]
    rows = task.report(examples, outputs)
    assert [(r.least, r.below, r.n, r.exact, r.names) for r in rows] == [(0, 16, 20, 1, 1), (32, 64, 20, 1, 1)]
    assert all(r.bleu == pytest.approx(100) for r in rows)
    spoilt = [np.where((o >= FIRST) & (o < FIRST + PIECES), STOP, o) for o in outputs[20:]]
    rows = task.report(examples, [*outputs[:20], *spoilt])
    assert rows[0].names == 1 and rows[1].names == 0 and rows[1].exact == 0 and 0 < rows[1].bleu < 90
    recalls = [r for e, o in zip(examples, [*outputs[:20], *spoilt]) for r in task.recalls(e, o)]
    by = recall_by(recalls, lambda r: r.length)
    assert list(by) == [10, 40] and by[10][0] == 1 and by[40][0] == 0 and sum(n for _, n in by.values()) == len(recalls)


@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_the_paper(name):
    specs = mt_config(name, 32_000).layers
    mixers = [spec["mixer"] for spec in specs]  # type: ignore[index]
    assert len(mixers) == (24 if "mamba" in name else 12)
    if name == "mamba-mha":
        for where, at in (("late", [11, 23]), ("early", [1, 11]), ("interleaved", list(range(1, 24, 2)))):
            layers = mt_config(name, 9, where=where).layers
            assert [i for i, spec in enumerate(layers) if spec["mixer"] == "attention"] == at  # type: ignore[index]
    assert name != "mamba-local" or specs[1]["window"] == 64  # type: ignore[index]
    torch.manual_seed(0)
    task = SSMMT()
    model = Decoder(mt_config(name, task.vocab_size, dim=32, depth=4))
    ids, targets = map(torch.from_numpy, batch(np.random.default_rng(0), 2, 6))
    out = model(ids, targets=targets)
    out.loss.backward()
    assert abs(out.loss.item() - math.log(task.vocab_size)) < 1 and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("encoder", "decoder"), [("mamba", "mamba"), ("transformer", "mamba"), ("transformer", "attention")])
def test_an_encoder_decoder_in_pieces_and_with_padding(encoder, decoder):
    torch.manual_seed(0)
    model = EncoderDecoder(40, 32, encoder, decoder, encoder_layers=2, decoder_layers=2, heads=4).double()
    source, target = torch.randint(5, 40, (2, 7)), torch.randint(5, 40, (2, 6))
    whole = model(source, target)
    assert whole.shape == (2, 6, 40)
    state = new = model.read(source)
    kept, parts = state.digest(), []
    for piece in target.split([1, 3, 2], 1):
        logits, new = model.step(piece, new)
        parts.append(logits)
    assert_close("pieces", torch.cat(parts, 1), whole, 1e-10)
    assert state.digest() == kept and new.seen.tolist() == [6, 6]
    for left in (True, False):  # pads of the source change nothing, on either side
        pad = torch.full((2, 3), 9)
        both = [pad, source] if left else [source, pad]
        mask = torch.cat([torch.full_like(part, part is source, dtype=torch.bool) for part in both], 1)
        assert_close("padding", model(torch.cat(both, 1), target, mask), whole, 1e-10)
    valid = torch.cat([torch.ones(2, 6), torch.zeros(2, 2)], 1).bool()
    assert_close("target padding", model(source, torch.cat([target, target[:, :2]], 1), None, valid)[:, :6], whole, 1e-10)
    changed = source.clone()
    changed[:, 2] = 4
    assert not torch.allclose(model(changed, target)[:, 0], whole[:, 0])  # the first token looks at the whole source
    whole.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for bad in (lambda: model(source.float(), target), lambda: model(source, target[:1]), lambda: model(source, target, valid)):
        with pytest.raises(ShapeError):
            bad()


class Written(State):
    seen: torch.Tensor  # [B, n], the ids so far


def test_beam_search_finds_the_best_of_all_and_carries_states():
    """With as many beams as there are texts it finds what trying them all finds; the state is the text, so a beam with another's shows."""
    torch.manual_seed(0)
    table = torch.randn(2, 4, 4, 4).mul(2)  # [row, the token before the last, the last, next]

    def step(ids, state):
        seen = torch.cat([state.seen, ids], 1)
        return table[seen[:, 0], seen[:, -2] if seen.shape[1] > 2 else 0, seen[:, -1]], Written(seen=seen)

    start = Written(seen=torch.tensor([[0], [1]]))
    logits = table[torch.tensor([0, 1]), 3, 3]
    most, eos = 4, 1
    for row, found in enumerate(beam_search(step, logits, start, eos, most, beams=4**most)):
        best, want = -math.inf, None
        for size in range(1, most + 1):
            for text in itertools.product(range(4), repeat=size):
                if eos in text[:-1] or (size < most and text[-1] != eos):
                    continue
                score, seen = float(logits[row].log_softmax(0)[text[0]]), [row, text[0]]
                for token in text[1:]:
                    score += float(table[seen[0], seen[-2] if len(seen) > 2 else 0, seen[-1]].log_softmax(0)[token])
                    seen.append(token)
                if score / size > best:
                    best, want = score / size, [t for t in text if t != eos]
        assert found == want
    with pytest.raises(UsageError, match="eos is 7"):
        beam_search(step, logits, start, 7)


def test_translating_with_a_decoder_and_with_an_encoder():
    torch.manual_seed(0)
    model = Decoder(mt_config("mamba-mha", 20, dim=32, depth=4)).eval()
    source = torch.randint(5, 20, (2, 6))
    out, ids = model(source, logits="last"), []
    for _ in range(5):
        ids.append(out.logits.argmax(-1))
        out = model(ids[-1], out.state, logits="last")
    greedy = [line[: line.index(EOS)] if EOS in line else line for line in torch.cat(ids, 1).tolist()]
    assert translate(model, source, EOS, most=5, beams=1) == greedy
    padded = torch.cat([torch.full((2, 2), 3), source], 1)
    valid = torch.cat([torch.zeros(2, 2), torch.ones(2, 6)], 1).bool()
    assert translate(model, padded, EOS, valid=valid, most=5, beams=3) == translate(model, source, EOS, most=5, beams=3)
    assert Span(valid).valid is valid
    both = EncoderDecoder(20, 32, encoder_layers=2, decoder_layers=2, heads=4).eval()
    lines = translate(both, source, EOS, bos=3, most=5, beams=3)
    assert lines == translate(both, padded, EOS, bos=3, valid=valid, most=5, beams=3) and all(len(line) <= 5 for line in lines)
    with pytest.raises(UsageError, match="bos is None"):
        translate(both, source, EOS)
