"""State: immutable, sliced, moved, digested, saved to the same bits, refused when damaged. Growing: grows, and is a value all the same."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from remanence import State
from remanence.errors import FileError, RemanenceError, ShapeError, StateError, UsageError
from remanence.state import Growing, select_rows


class LeafForTests(State):
    memory: Tensor
    cache: Growing


class TreeForTests(State):
    seen: Tensor
    parts: tuple
    scale: float
    note: str
    nothing: None
    half: Tensor


def tree(batch: int = 3) -> TreeForTests:
    random = torch.Generator().manual_seed(batch)

    def leaf() -> LeafForTests:
        return LeafForTests(memory=torch.randn(batch, 4, 5, generator=random), cache=Growing(torch.randn(batch, 7, 2, generator=random)))

    half = torch.randn(batch, 2, generator=random).bfloat16()
    parts = (leaf(), (leaf(), torch.ones(batch, 0)))
    state = TreeForTests(seen=torch.arange(batch) + 5, parts=parts, scale=0.5, note="é", nothing=None, half=half)
    return state.stamp("tree", "0123")


NAMES = ["seen", "parts.0.memory", "parts.0.cache", "parts.1.0.memory", "parts.1.0.cache", "parts.1.1", "half"]


def same(a: State, b: State) -> None:
    assert type(a) is type(b) and a.header == b.header and a.digest() == b.digest()


# A value


class SpectrumForTests(State):
    modes: Tensor


def test_complex_tensors_are_states_too(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    state = SpectrumForTests(modes=torch.randn(2, 3, generator=random, dtype=torch.complex64))
    state.save(tmp_path / "s.safetensors")
    assert State.load(tmp_path / "s.safetensors").digest() == state.digest()
    assert state.to(dtype=torch.float64).modes.dtype == torch.complex128
    with pytest.raises(StateError, match="'modes' holds NaN"):
        state.replace(modes=state.modes * torch.nan).save(tmp_path / "nan.safetensors")
    with pytest.raises(StateError, match="'modes' cannot be deleted"):
        del state.modes


def test_a_state_cannot_be_set() -> None:
    state = tree()
    for name in ("seen", "header", "new"):
        with pytest.raises(StateError, match=f"'{name}' cannot be set; make a changed copy"):
            setattr(state, name, torch.zeros(3))
    same(state, tree())


def test_fields_are_all_given_and_no_others() -> None:
    for values in ({"memory": torch.zeros(1)}, {"memory": 0, "cache": 0, "extra": 0}):
        with pytest.raises(UsageError, match="has the fields memory, cache"):
            LeafForTests(**values)


def test_names_tokens_bytes_batch() -> None:
    state = tree()
    assert [name for name, _ in state.named_tensors()] == NAMES
    assert state.tokens == 7 and state.batch == 3 and state.device.type == "cpu"
    assert state.nbytes == 3 * 8 + 2 * (3 * 20 * 4 + 3 * 14 * 4) + 3 * 2 * 2
    assert state.parts[0].tokens == 0  # a part that does not count
    assert "seen [3]" in repr(state) and len(repr(state)) < 300


def test_replace_shares_the_rest() -> None:
    state = tree()
    new = state.replace(scale=2.0)
    assert (new.scale, state.scale, new.header) == (2.0, 0.5, state.header) and new.parts is state.parts
    with pytest.raises(UsageError, match="has no field sclae"):
        state.replace(sclae=2.0)


def test_map_reaches_every_tensor_and_nothing_else() -> None:
    state = tree()
    twice = state.map(lambda t: t + t)
    assert (twice.scale, twice.note, twice.nothing, twice.header) == (0.5, "é", None, state.header)
    assert isinstance(twice.parts[0].cache, Growing)
    for (name, a), (_, b) in zip(state.named_tensors(), twice.named_tensors(), strict=True):
        assert torch.equal(2 * a, b), name
    same(state, tree())


def test_rows() -> None:
    state = tree()
    picked = state.rows([2, 0, 2, -1])
    for (name, a), (_, b) in zip(state.named_tensors(), picked.named_tensors(), strict=True):
        assert torch.equal(a[[2, 0, 2, 2]], b), name
    assert state.rows([]).batch == 0 and state.rows(torch.tensor([1])).batch == 1
    for index in ([3], [-4], [[0]]):
        with pytest.raises(StateError, match=r"3 rows; each must be in 0\.\.2"):
            state.rows(index)


def test_to_and_detach_and_clone() -> None:
    state = tree()
    moved = state.to("meta", torch.float64)
    assert {str(t.device) for t in moved.tensors()} == {"meta"} and moved.seen.dtype == torch.int64
    assert {t.dtype for t in moved.tensors() if t.is_floating_point()} == {torch.float64}
    same(state.to("cpu"), state)
    leaf = torch.ones(3, 2, requires_grad=True)
    linked = state.replace(half=leaf * 2)
    assert linked.half.requires_grad and not linked.detach().half.requires_grad
    copied = state.clone()
    copied.seen.zero_()
    same(state, tree())


def test_digest_sees_every_bit() -> None:
    state, digests = tree(), {tree().digest()}
    digests.add(state.replace(half=state.half.to(torch.float16)).digest())
    digests.add(state.replace(half=state.half.reshape(2, 3)).digest())
    digests.add(state.replace(half=state.half * 0).digest())
    digests.add(state.replace(half=state.half * -0.0).digest())
    assert len(digests) == 5
    assert state.map(lambda t: t.mT.contiguous().mT if t.ndim > 2 else t).digest() == state.digest()  # strides are not content


def test_select_rows() -> None:
    one, other = tree(), tree().map(lambda t: t + 1)
    chosen = select_rows(torch.tensor([True, False, True]), one, other)
    for name, tensor in chosen.named_tensors():
        a, b = dict(one.named_tensors())[name], dict(other.named_tensors())[name]
        assert torch.equal(tensor, torch.stack([a[0], b[1], a[2]])), name
    with pytest.raises(ShapeError, match=r"'seen' has shape \[3\] in one and \[2\] in the other"):
        select_rows(torch.tensor([True]), one, tree(2))


# Growing


class GrowingAgainstPlainTensors(RuleBasedStateMachine):
    """Forks of forks, appended to in any order, under autograd or not: each is what concatenation says, for ever."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[Growing, Tensor]] = []
        self.count = 0

    def numbers(self, n: int) -> Tensor:
        self.count += 1
        return torch.full((2, n, 3), float(self.count)) + torch.arange(n)[None, :, None] / 64

    def keep(self, growing: Growing, want: Tensor) -> tuple[Growing, Tensor]:
        self.all.append((growing, want))
        return growing, want

    @initialize(target=held, n=st.integers(0, 3))
    def start(self, n: int) -> tuple[Growing, Tensor]:
        new = self.numbers(n)
        return self.keep(Growing(new), new.clone())

    @rule(target=held, pair=held, n=st.integers(1, 20), grad=st.booleans())
    def append(self, pair: tuple[Growing, Tensor], n: int, grad: bool) -> tuple[Growing, Tensor]:
        new = self.numbers(n)
        with torch.set_grad_enabled(grad):
            longer = pair[0].append(new)
        return self.keep(longer, torch.cat([pair[1], new], 1))

    @invariant()
    def every_value_is_what_it_was(self) -> None:
        for growing, want in self.all:
            assert growing.length == want.shape[1] and torch.equal(growing.tensor, want)


TestGrowingAgainstPlainTensors = GrowingAgainstPlainTensors.TestCase
TestGrowingAgainstPlainTensors.settings = settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)


@pytest.mark.parametrize("size", [1, 3])
def test_growing_copies_rarely(size: int) -> None:
    """1,000 appends move the data O(log n) times: doubling from 16."""
    with torch.no_grad():
        growing, places = Growing(torch.zeros(1, 1, 2)), set()
        for i in range(1000):
            growing = growing.append(torch.full((1, size, 2), float(i)))
            places.add(growing.tensor.data_ptr())
    assert growing.length == 1 + 1000 * size and len(places) <= 11
    assert torch.equal(growing.tensor[0, 1::size, 0], torch.arange(1000.0))


def test_growing_under_autograd_keeps_the_graph() -> None:
    first, second = torch.ones(1, 2, 1, requires_grad=True), torch.ones(1, 3, 1, requires_grad=True)
    (Growing(first).append(second).append(second).tensor ** 2).sum().backward()
    assert first.grad is not None and second.grad is not None
    assert torch.equal(first.grad, torch.full_like(first, 2)) and torch.equal(second.grad, torch.full_like(second, 4))


# Files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    tree().save(path)
    return path


def test_a_saved_state_comes_back_to_the_same_bits(saved: Path) -> None:
    state, loaded = tree(), State.load(saved)
    same(state, loaded)
    assert (loaded.scale, loaded.note, loaded.nothing) == (0.5, "é", None) and isinstance(loaded.parts[0].cache, Growing)
    for (name, a), (_, b) in zip(state.named_tensors(), loaded.named_tensors(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    assert {key: header[key] for key in ("format", "version", "system", "config", "tokens")} == {
        "format": "remanence-state", "version": "1", "system": "tree", "config": "0123", "tokens": "7",
    }  # fmt: skip
    assert header["dtype"] == "bfloat16,float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_every_dtype_is_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    state = tree().replace(half=(torch.randn(3, 2) * 3).to(dtype))
    state.save(tmp_path / "s")
    same(State.load(tmp_path / "s"), state)


def test_infinity_is_saved_and_nan_is_not(tmp_path: Path) -> None:
    state = tree()
    state.replace(half=torch.full((3, 2), -torch.inf)).save(tmp_path / "s")
    assert (State.load(tmp_path / "s").half == -torch.inf).all()
    before = (tmp_path / "s").read_bytes()
    memory = state.parts[0].memory.clone()
    memory[1, 2, 3] = torch.nan
    with pytest.raises(StateError, match="'parts.0.memory' holds NaN"):
        state.replace(parts=(state.parts[0].replace(memory=memory), state.parts[1])).save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="nowhere does not exist"):
        State.load(tmp_path / "nowhere")
    with pytest.raises(StateError, match="is a directory"):
        State.load(tmp_path)
    (tmp_path / "text").write_text("not a state")
    with pytest.raises(StateError, match="text is truncated or is not a safetensors file"):
        State.load(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(StateError, match="not a state"):
        State.load(tmp_path / "weights")


def refused_or_equal(path: Path) -> None:
    """Loading gives a one-line StateError that names the file, or exactly what was saved."""
    try:
        loaded = State.load(path)
    except StateError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    same(loaded, tree())
    assert (loaded.scale, loaded.note, loaded.nothing) == (0.5, "é", None)


@settings(max_examples=25)
@given(st.floats(0, 0.9999))
@example(0.0)
@example(0.001)
@example(0.9999)
def test_a_truncated_file_is_refused(saved: Path, tmp_path_factory: pytest.TempPathFactory, part: float) -> None:
    whole = saved.read_bytes()
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(StateError, match="truncated is truncated"):
        State.load(path)


@settings(max_examples=300)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_harmless(saved: Path, tmp_path_factory: pytest.TempPathFactory, where: float, bit: int) -> None:
    data = bytearray(saved.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(data)
    refused_or_equal(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "99"}, "state format version 99; this library reads version 1"),
        ({"version": None}, "state format version None"),
        ({"format": "other"}, "not a state"),
        ({"sha256": "0" * 64}, "changed after it was saved"),
        ({"structure": "{}"}, "changed after it was saved"),
        ({"structure": None}, "changed after it was saved"),
    ],
)
def test_a_changed_header_is_refused(saved: Path, tmp_path: Path, change: dict[str, str | None], words: str) -> None:
    with safe_open(saved, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = {key: value for key, value in {**header, **change}.items() if value is not None}
    save_file(tensors, tmp_path / "s", metadata=header)
    with pytest.raises(StateError, match=words):
        State.load(tmp_path / "s")
    header = {**header, **{key: "" for key in change}}
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "s", metadata=header)
    with pytest.raises(StateError):
        State.load(tmp_path / "s")


def test_a_state_class_that_is_not_known_is_named(tmp_path: Path) -> None:
    class GoneForTests(State):
        memory: Tensor

    GoneForTests(memory=torch.zeros(2)).save(tmp_path / "s")
    del State._kinds["GoneForTests"]
    with pytest.raises(StateError, match="GoneForTests"):
        State.load(tmp_path / "s")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: the writer is told so by the operating system, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_survives(folder: Path) -> None:
    """A save that fails leaves the old file and nothing else."""
    same(State.load(folder / "s"), tree())
    assert os.listdir(folder) == ["s"]


def big() -> State:
    return tree().replace(half=torch.randn(3, 100_000))


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    tree().save(tmp_path / "s")
    with largest_file(50_000), pytest.raises(FileError, match="could not be written .*; what was there before is unchanged"):
        big().save(tmp_path / "s")
    assert_survives(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        tree().save(tmp_path / "s")
        with pytest.raises(FileError, match="[Nn]o space left"):
            big().save(tmp_path / "s")
        assert_survives(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_loaded_state_does_not_hang_on_its_file(tmp_path: Path) -> None:
    """Someone may write into the file, or cut it, while a state read from it is still held."""
    path = tmp_path / "s"
    big().save(path)
    loaded = State.load(path)
    digest, size = loaded.digest(), path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"x" * (size // 4))
    assert loaded.digest() == digest


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a directory"):
        tree().save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RemanenceError, match="could not be written"):
        tree().save(tmp_path / "file" / "s")
    tree().save(tmp_path / "new" / "folder" / "s")
    same(State.load(str(tmp_path / "new" / "folder" / "s")), tree())


def test_a_field_may_not_hide_what_every_state_has():
    with pytest.raises(TypeError, match="has a field 'tokens'"):
        type("Hiding", (State,), {"__annotations__": {"tokens": torch.Tensor}})
