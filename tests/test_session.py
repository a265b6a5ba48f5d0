"""Session: cuts of the text, questions on forks, rewinding, saving; and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import remanence as rm
from helpers import assert_states_close
from remanence import session as module
from remanence.errors import FileError, StateError, UsageError
from remanence.session import PIECE, RECENT, Session, answer, fingerprint, read_note
from remanence.tokenizers import BPETokenizer, ByteTokenizer

TEXT = "It was the best of times, it was the worst of times.\n\nMary went to the garden.  " * 40
BPE = BPETokenizer.train([TEXT], 400)
VOCAB = BPE.vocab_size + 10  # a model may have more ids than its tokenizer


def tiny(seed: int = 0, vocab: int = VOCAB) -> rm.Model:
    torch.manual_seed(seed)
    layers = [{"mixer": "gated-deltanet", "heads": 2}, {"mixer": "attention", "heads": 2, "window": 8}]
    return rm.Decoder(rm.ModelConfig(vocab=vocab, dim=16, layers=layers, ffn=1.0)).eval()


MODEL = tiny()


def ids_of(session: Session) -> list[int]:
    return torch.cat(session._recent).tolist()


def test_it_is_exported() -> None:
    assert rm.Session is Session


@given(st.lists(st.integers(0, len(TEXT)), max_size=6))
def test_an_iterable_may_be_cut_anywhere(places: list[int]) -> None:
    edges = [0, *sorted(places), len(TEXT)]
    got = Session(MODEL, BPE).read(TEXT[a:b] for a, b in zip(edges, edges[1:]))
    assert ids_of(got) == BPE.encode(TEXT.rstrip())
    assert got.pending == "  " and got.tokens == len(ids_of(got)) == got.state.tokens


@given(st.sampled_from([i for i in range(1, len(TEXT) - 2) if TEXT[i].isspace() or TEXT[i - 1].isspace()]))
def test_two_reads_cut_beside_white_space_are_one(cut: int) -> None:
    got = Session(MODEL, BPE).read(TEXT[:cut]).read(TEXT[cut:])
    want = Session(MODEL, BPE).read(TEXT)
    assert ids_of(got) == ids_of(want)
    assert_states_close("two reads", got.state, want.state, 1e-5)


def test_calls_are_of_4096_tokens_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = tiny(vocab=259), []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    session = Session(model, ByteTokenizer()).read("word " for _ in range(2 * PIECE // 5 + 100))
    assert lengths == [PIECE, PIECE, session.tokens - 2 * PIECE]


def test_reading_reports_its_progress_and_keeps_no_graph() -> None:
    counts: list[int] = []
    session = Session(MODEL, BPE).read(TEXT, progress=counts.append)
    assert sum(counts) == session.tokens
    assert not any(t.requires_grad for t in session.state.tensors())


def test_a_path_and_a_string_that_names_a_file_are_read_as_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    want = Session(MODEL, BPE).read(TEXT).state.digest()
    assert Session(MODEL, BPE).read(file).state.digest() == want
    assert Session(MODEL, BPE).read(str(file)).state.digest() == want


def test_asking_changes_nothing_and_agrees_with_the_model() -> None:
    session = Session(MODEL, BPE).read(TEXT)
    before = session.state.digest()
    got = session.ask(" Where is Mary? \n", max_new=5)
    assert session.state.digest() == before and session.tokens == len(BPE.encode(TEXT.rstrip()))
    ids = torch.tensor([BPE.encode(TEXT.rstrip()) + BPE.encode(" Where is Mary?")])
    with torch.no_grad():
        for step in range(5):
            logits = MODEL(ids).logits[0, -1]
            if step == 0:
                assert torch.allclose(got.logits, logits, atol=1e-5)
            token = int(logits.argmax())
            if token == BPE.eos:
                break
            assert got.ids[step] == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert got.text == BPE.decode(got.ids).strip()


def test_questions_of_different_length_are_asked_together() -> None:
    state = Session(MODEL, BPE).read(TEXT).state
    questions = ["Who?", "Where was Mary before the garden, and why?"]
    together = answer(MODEL, BPE, state.rows([0, 0]), questions)
    for question, got in zip(questions, together):
        alone = answer(MODEL, BPE, state, [question])[0]
        assert alone.ids == got.ids and torch.allclose(alone.logits, got.logits, atol=1e-5)


def test_an_answer_ends_before_eos(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(
        model, "head", lambda hidden: torch.nn.functional.one_hot(torch.full(hidden.shape[:2], BPE.eos), model.vocab).float()
    )
    session = Session(model, BPE).read(TEXT)
    assert session.ask("Where?").ids == () and session.ask("Where?").text == ""
    assert session.generate(" And") == "" and ids_of(session)[-1] != BPE.eos


def test_generate_continues_the_stream() -> None:
    session = Session(MODEL, BPE).read(TEXT)
    text = session.generate("Then", max_new=6)
    whole = Session(MODEL, BPE).feed(ids_of(session))
    assert ids_of(session)[: len(BPE.encode(TEXT + "Then"))] == BPE.encode(TEXT + "Then")
    assert session.tokens == whole.tokens and text == BPE.decode(ids_of(session)[len(BPE.encode(TEXT + "Then")) :])
    assert_states_close("generated", session.state, whole.state, 1e-5)


def test_sampling_depends_on_the_seed_alone() -> None:
    start = Session(MODEL, BPE).read(TEXT)
    one, same, other = (start.fork().generate("x", 20, temperature=1.0, top_k=50, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert start.fork().generate("x", 20, temperature=1.0, top_k=1) == start.fork().generate("x", 20)


def test_forks_go_their_own_ways() -> None:
    one = Session(MODEL, BPE).read(TEXT)
    digest, other = one.state.digest(), one.fork()
    other.read(" More.")
    assert one.state.digest() == digest and one.tokens < other.tokens and one.snapshots != other.snapshots


def test_rewind_to_a_snapshot_gives_the_same_bits() -> None:
    session = Session(MODEL, BPE).read(TEXT)
    tokens, digest = session.tokens, session.state.digest()
    session.read(" Something else.").rewind(tokens)
    assert session.tokens == tokens and session.state.digest() == digest and session.pending == ""
    assert session.rewind(0).state is None and session.tokens == 0


def test_rewind_between_snapshots_reads_again() -> None:
    session = Session(MODEL, BPE).read(TEXT)
    ids = ids_of(session)
    session.rewind(100)
    assert_states_close("rewound", session.state, Session(MODEL, BPE).feed(ids[:100]).state, 1e-5)
    session.feed(ids[100:])
    assert ids_of(session) == ids


def test_rewind_is_refused_where_the_tokens_are_gone() -> None:
    session = Session(MODEL, BPE)
    session._remember = lambda piece: Session._remember(session, piece)  # type: ignore[method-assign]
    for _ in range(2 * RECENT // PIECE):
        session.tokens += PIECE  # only the book-keeping: no model is run
        session._remember(torch.zeros(PIECE, dtype=torch.long))
    assert RECENT <= len(ids_of(session)) < RECENT + PIECE
    assert len(session.snapshots) <= 2 * 18 and session.snapshots[0] == 0
    with pytest.raises(StateError, match="tokens are kept from"):
        session.rewind(10)
    for bad in (-1, session.tokens + 1, 1.5):
        with pytest.raises(UsageError, match="whole number"):
            session.rewind(bad)  # type: ignore[arg-type]


def test_a_state_holds_no_more_memory_than_it_says() -> None:
    session = Session(MODEL, BPE).read(TEXT)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in session.state.tensors()}
    assert sum(held.values()) <= 2 * session.state_bytes


def test_snapshots_grow_with_the_logarithm() -> None:
    session = Session(MODEL, BPE)
    for i in range(1, 5000):
        session.tokens = i * PIECE
        session._remember(torch.zeros(1, dtype=torch.long))
    assert len(session.snapshots) <= 2 * (5000 * PIECE).bit_length()
    ages = [session.tokens - at for at in session.snapshots[1:]]
    assert all(older <= 4 * newer + PIECE for older, newer in zip(ages, ages[1:]))  # no gap in the octaves


def test_save_and_load_to_the_bit(tmp_path: Path) -> None:
    session = Session(MODEL, BPE).read(TEXT)
    session.source = "somewhere"
    session.save(tmp_path / "s.safetensors")
    again = Session.load(tmp_path / "s.safetensors", MODEL, BPE)
    assert (again.tokens, again.pending, again.source) == (session.tokens, "  ", "somewhere")
    assert again.state.digest() == session.state.digest() == rm.State.load(tmp_path / "s.safetensors").digest()
    assert again.ask("Where?").digest == session.ask("Where?").digest
    assert again.read("More.").state.digest() == session.read("More.").state.digest()
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_bare_state_can_be_continued(tmp_path: Path) -> None:
    session = Session(MODEL, BPE).read(TEXT)
    session.state.save(tmp_path / "s.safetensors")
    again = Session.load(tmp_path / "s.safetensors", MODEL, BPE)
    assert again.tokens == session.tokens and again.ask("Where?").digest == session.ask("Where?").digest


def test_another_process_gives_the_same_bits(tmp_path: Path) -> None:
    MODEL.save(tmp_path / "model")
    BPE.save(tmp_path / "model")
    session = Session(MODEL, BPE).read(TEXT)
    session.save(tmp_path / "s.safetensors")
    code = (
        "import sys, remanence as rm; from remanence.session import load_reader; from pathlib import Path; at = Path(sys.argv[1]);"
        "print(rm.Session.load(at / 's.safetensors', *load_reader(at / 'model')).ask('Where is Mary?').digest)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == session.ask("Where is Mary?").digest


def test_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    Session(MODEL, BPE).read(TEXT).save(path)
    with pytest.raises(StateError, match="other weights"):
        Session.load(path, tiny(seed=1), BPE)
    with pytest.raises(StateError, match="does not fit this model"):
        Session.load(path, tiny(vocab=500), BPE)
    with pytest.raises(UsageError, match="the tokenizer has"):
        Session(tiny(vocab=260), BPE)
    assert fingerprint(tiny()) == fingerprint(MODEL) != fingerprint(tiny(seed=1))


def test_a_changed_note_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    Session(MODEL, BPE).read(TEXT).save(path)
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    note = json.loads(header["session"]) | {"pending": "xyz"}
    save_file(load_file(path), path, metadata=header | {"session": json.dumps(note)})
    with pytest.raises(StateError, match="was changed after it was saved"):
        read_note(path)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    session = Session(MODEL, BPE)
    with pytest.raises(StateError, match="nothing was read"):
        session.save(tmp_path / "s.safetensors")
    for bad in ("", tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError):
            session.read(bad)
    for call in (lambda: session.ask("  "), lambda: session.generate(""), lambda: session.generate("a", temperature=-1)):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(UsageError, match="max_new"):
        session.ask("Where?", max_new=0)
    assert session.tokens == 0 and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"file/s\.safetensors could not be written"):
        session.read(TEXT).save(tmp_path / "file" / "s.safetensors")


def test_a_missing_checkpoint_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "shipped", lambda: tmp_path / "none")
    with pytest.raises(UsageError, match="no shipped checkpoint"):
        module.load_reader()
