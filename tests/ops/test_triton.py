"""The Triton forms of scan, outer and delta against the equations: on a GPU, and in Triton's interpreter, which needs none.

Where torch finds no GPU, one test runs this file again in a process with TRITON_INTERPRET=1; it is skipped where triton is not installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers import assert_close, assert_gradients_close
from remanence.errors import BackendError
from remanence.ops import backend, delta, outer, scan
from remanence.span import Span

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = 1e-10
WHICH = ("none", "first", "last", "several")

kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="torch finds no CUDA device, and triton's interpreter is off")


def on(*marks: pytest.MarkDecorator) -> Callable:
    """Mark a test that runs kernels."""

    def mark(test: Callable) -> Callable:
        for one in (pytest.mark.gpu, kernels, *marks):
            test = one(test)
        return test

    return mark


def resets(batch: int, length: int, which: str) -> Tensor | None:
    """[B, T]: a reset at the first or the last token of the first row, or at several of both rows; or none."""
    reset = torch.zeros(batch, length, dtype=torch.bool, device=DEVICE)
    several = [0, length // 3, min(length // 3 + 1, length - 1), length // 2]
    reset[0, {"none": [], "first": [0], "last": [length - 1], "several": several}[which]] = True
    reset[-1, length // 2] |= which == "several"
    return reset if which != "none" else None


def both(got: Callable, want: Callable, leaves: dict[str, Tensor], tol: float, grad_tol: float | None = None) -> None:
    """Outputs, last states and all gradients of two forms; the second gets the leaves in float64."""

    def run(rule: Callable, leaves: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
        o, S = rule(*leaves.values())
        torch.manual_seed(7)
        weights = [torch.randn(x.shape, dtype=torch.complex128 if x.is_complex() else torch.float64, device=x.device) for x in (o, S)]
        loss = sum((x * weight).real.sum() for x, weight in zip((o, S), weights))
        return (o, S), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))

    wide = {name: x.to(torch.complex128 if x.is_complex() else torch.float64) for name, x in leaves.items()}
    (o, S), grads = run(got, leaves)
    (true_o, true_S), true_grads = run(want, wide)
    assert_close("output", o, true_o, tol)
    assert_close("last state", S, true_S, tol)
    assert_gradients_close("forms", grads, true_grads, grad_tol or tol)


def scan_inputs(batch: int, length: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Log decays from none to e^-10 a token, turning ones if complex."""
    torch.manual_seed(length)
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    log_a = -torch.rand(batch, length, width, dtype=real) * torch.tensor([0.0, 0.01, 0.3, 3.0, 10.0], dtype=real)[torch.arange(width) % 5]
    if dtype.is_complex:
        log_a = torch.complex(log_a, torch.randn(batch, length, width, dtype=real))
    b, initial = torch.randn(batch, length, width, dtype=dtype), torch.randn(batch, width, dtype=dtype)
    return {name: x.to(DEVICE) for name, x in (("log_a", log_a), ("b", b), ("initial", initial))}


def key_value_inputs(
    batch: int, length: int, heads: int, groups: int, widths: tuple[int, int], dtype: torch.dtype, beta: bool
) -> dict[str, Tensor]:
    """q, k [B, T, G, K], v [B, T, H, V], log decays from none to e^-3 a token, beta in (0, 2) if asked for, initial."""
    torch.manual_seed(length)
    q, k = torch.randn(2, batch, length, groups, widths[0], dtype=torch.float64).unbind()
    v = torch.randn(batch, length, heads, widths[1], dtype=torch.float64)
    g = -torch.rand(batch, length, heads, dtype=torch.float64) * torch.tensor([0.1, 3.0, 0.0])[torch.arange(heads) % 3]
    leaves = {"q": q, "k": torch.nn.functional.normalize(k, dim=-1), "v": v}
    leaves = {name: x.to(DEVICE, dtype) for name, x in leaves.items()}
    leaves["log_decay"] = g
    if beta:
        leaves["beta"] = 2 * torch.rand(batch, length, heads, dtype=torch.float64)
    leaves["initial"] = torch.randn(batch, heads, *widths, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    return {name: x if name in "qkv" else x.to(DEVICE, wide) for name, x in leaves.items()}


@on()
@pytest.mark.parametrize(
    ("batch", "length", "width", "which", "dtype"),
    [
        (2, 1, 3, "none", torch.float64),
        (2, 63, 5, "first", torch.float64),
        (2, 64, 5, "last", torch.float32),
        (2, 66, 130, "several", torch.float64),
        (1, 66, 5, "several", torch.complex128),
        (2, 9, 5, "none", torch.complex64),
    ],
)
def test_scan(batch: int, length: int, width: int, which: str, dtype: torch.dtype) -> None:
    from remanence.ops.scan.triton import chunk

    leaves, reset = scan_inputs(batch, length, width, dtype), resets(batch, length, which)
    tol = EXACT if dtype in (torch.float64, torch.complex128) else 1e-5
    both(lambda *x: chunk(*x, reset), lambda *x: scan.naive(*x, reset), leaves, tol)


@on()
def test_scan_with_a_decay_of_zero_and_three_levels() -> None:
    """log a = -inf forgets exactly; a short chunk makes three levels of few tokens."""
    from remanence.ops.scan import triton as module

    leaves = scan_inputs(1, 30, 3, torch.float64)
    leaves["log_a"] = leaves["log_a"].masked_fill(torch.rand(1, 30, 3, device=DEVICE) < 0.1, -torch.inf)
    size, module.SIZE = module.SIZE, 4
    try:
        for got, want in zip(module.chunk(*leaves.values()), scan.naive(*leaves.values())):
            assert_close("h", got, want, EXACT)
    finally:
        module.SIZE = size


@on()
def test_scan_twice_differentiable() -> None:
    from remanence.ops.scan.triton import chunk

    leaves = [x.requires_grad_() for x in scan_inputs(1, 3, 2, torch.float64).values()]
    assert torch.autograd.gradgradcheck(lambda *x: chunk(*x)[0].square(), leaves)


@on()
@pytest.mark.parametrize(
    ("batch", "length", "groups", "widths", "which", "dtype", "tol"),
    [
        (2, 1, 2, (5, 3), "first", torch.float64, EXACT),
        (2, 32, 1, (5, 3), "none", torch.float64, EXACT),
        (2, 67, 2, (5, 3), "several", torch.float64, EXACT),
        (1, 35, 1, (70, 40), "last", torch.float64, EXACT),  # two blocks of channels either way
        (1, 35, 2, (8, 16), "several", torch.float32, 1e-5),
        (1, 35, 2, (8, 16), "none", torch.bfloat16, 2e-2),
    ],
)
def test_outer(batch: int, length: int, groups: int, widths: tuple[int, int], which: str, dtype: torch.dtype, tol: float) -> None:
    from remanence.ops.outer.triton import chunk

    leaves, reset = key_value_inputs(batch, length, 2, groups, widths, dtype, beta=False), resets(batch, length, which)
    both(lambda *x: chunk(*x, reset), lambda *x: outer.naive(*x, reset), leaves, tol)


@on()
@pytest.mark.parametrize(
    ("batch", "length", "widths", "which", "dtype", "tol"),
    [
        (2, 1, (6, 4), "first", torch.float64, EXACT),
        (2, 64, (6, 4), "none", torch.float64, EXACT),
        (2, 131, (6, 4), "several", torch.float64, EXACT),
        (1, 35, (70, 40), "last", torch.float64, EXACT),
        (1, 67, (8, 16), "several", torch.float32, 1e-5),
        (1, 67, (8, 16), "none", torch.bfloat16, 2e-2),
    ],
)
def test_delta(batch: int, length: int, widths: tuple[int, int], which: str, dtype: torch.dtype, tol: float) -> None:
    from remanence.ops.delta.triton import chunk

    leaves, reset = key_value_inputs(batch, length, 2, 2, widths, dtype, beta=True), resets(batch, length, which)
    both(lambda *x: chunk(*x, reset), lambda *x: delta.naive(*x, reset), leaves, tol)


@on()
def test_delta_stays_accurate_with_equal_keys() -> None:
    from remanence.ops.delta.triton import chunk

    leaves = key_value_inputs(1, 100, 1, 1, (6, 4), torch.float32, beta=True)
    leaves["k"] = torch.nn.functional.normalize(leaves["k"][:, :1] + 1e-3 * torch.randn_like(leaves["k"]), dim=-1)
    leaves |= {"log_decay": leaves["log_decay"] * 0, "beta": leaves["beta"] * 0 + 1.9}
    exact = delta.naive(*(x.double() for x in leaves.values()))
    for name, got, want in zip(("o", "S"), chunk(*leaves.values()), exact):
        assert_close(name, got, want, 1e-5)


def rules(dtype: torch.dtype = torch.float64) -> dict[str, tuple[Callable, dict[str, Tensor]]]:
    """Each rule by the door that mixers use, and its inputs: two rows of 40 tokens."""
    return {
        "scan": (scan.scan, scan_inputs(2, 40, 3, dtype)),
        "outer": (outer.outer, key_value_inputs(2, 40, 2, 2, (5, 3), dtype, beta=False)),
        "delta": (delta.delta, key_value_inputs(2, 40, 2, 2, (5, 3), dtype, beta=True)),
    }


@on()
@pytest.mark.parametrize("name", ["scan", "outer", "delta"])
def test_by_name(name: str) -> None:
    """backend="triton" with padding and resets; outer also with a bonus; one token runs the step form."""
    rule, leaves = rules()[name]
    span = Span(torch.arange(40, device=DEVICE) < torch.tensor([[40], [33]], device=DEVICE), resets(2, 40, "several"))
    more = [{}, {"bonus": torch.randn(2, 5, dtype=torch.float64, device=DEVICE)}] if name == "outer" else [{}]
    for given in more:
        want = rule(*leaves.values(), span=span, backend="naive", **given)
        for got, true in zip(rule(*leaves.values(), span=span, backend="triton", **given), want):
            assert_close(name, got, true, EXACT)
    one = [x if key == "initial" else x[:, :1] for key, x in leaves.items()]
    assert_close("one token", rule(*one, backend="triton")[0], rule(*one, backend="naive")[0], EXACT)


@on()
@pytest.mark.parametrize("name", ["scan", "outer", "delta"])
def test_compiles(name: str) -> None:
    """torch.compile keeps the kernels whole, forward and backward."""
    rule, leaves = rules()[name]
    compiled = torch.compile(lambda *x: rule(*x, backend="triton"), backend="aot_eager", fullgraph=True)
    both(compiled, lambda *x: rule(*x, backend="naive"), leaves, EXACT)


@on()
def test_what_the_kernels_do_not_take() -> None:
    leaves = key_value_inputs(1, 2, 1, 1, (5, 3), torch.float32, beta=False)
    by_key = leaves | {"log_decay": leaves["log_decay"][..., None].expand(-1, -1, -1, 5)}
    with pytest.raises(BackendError, match="one decay a head"):
        outer.outer(*by_key.values(), backend="triton")
    wide = key_value_inputs(1, 2, 1, 1, (backend.WIDEST + 1, 3), torch.float32, beta=True)
    with pytest.raises(BackendError, match="at most 256 key channels"):
        delta.delta(*wide.values(), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu" or not backend.INSTALLED["fla"], reason="fla's kernels need a CUDA device and fla-core")
@pytest.mark.parametrize("name", ["scan", "outer", "delta"])
def test_fla(name: str) -> None:
    """fla's kernels in bf16, for whole rows and for the documents of one."""
    rule, leaves = rules()[name]
    leaves = {key: x.bfloat16() if key in "qkvb" else x.float() for key, x in leaves.items()}
    both(lambda *x: rule(*x, backend="fla"), lambda *x: rule(*x, backend="naive"), leaves, 2e-2, 5e-2)
    row, span = [x[:1] for x in leaves.values()], Span(reset=resets(1, 40, "several"))
    for got, want in zip(rule(*row, span=span, backend="fla"), rule(*row, span=span, backend="naive")):
        assert_close(name, got, want, 2e-2)


@pytest.mark.parametrize("fresh", [False, True])
def test_documents_as_fla_takes_them(fresh: bool) -> None:
    reset = torch.tensor([[fresh, False, True, True, False]])
    initial, given = backend.fla_documents(reset, torch.ones(1, 2, 3))
    assert given["cu_seqlens"].tolist() == [0, 2, 3, 5]
    assert initial is not None and initial.shape == (3, 2, 3)
    assert initial[0].eq(not fresh).all() and not initial[1:].any()
    assert backend.fla_documents(None, None) == (None, {})


@pytest.mark.parametrize("name", ["scan", "outer", "delta"])
def test_what_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence each: no GPU, no package, resets that fla has no word for, a rule without such a form."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rule, leaves = rules()[name]
    cpu = [x.cpu() for x in leaves.values()]
    for asked in ("triton", "fla"):
        with pytest.raises(BackendError, match=f"no {asked} form for tensors on a CPU"):
            rule(*cpu, backend=asked)
    there = torch.device("cuda")
    monkeypatch.setattr(backend, "INSTALLED", {"triton": False, "fla": False})
    assert backend.pick("auto", 2, there, {"triton": ""}) == "chunk"
    with pytest.raises(BackendError, match="package fla-core is not installed"):
        backend.pick("fla", 2, there, {"fla": ""})
    monkeypatch.setattr(backend, "INSTALLED", {"triton": True, "fla": True})
    assert backend.pick("auto", 2, there, {"triton": "", "fla": ""}) == "triton" == backend.pick("triton", 2, there, {"triton": ""})
    assert backend.pick("auto", 1, there, {"triton": ""}) == "step" and backend.pick("torch", 2, there, {"triton": ""}) == "chunk"
    assert backend.pick("auto", 2, there, {"triton": "it is too wide"}) == "chunk" == backend.pick("auto", 2, there)
    with pytest.raises(BackendError, match="this rule has no fla form"):
        backend.pick("fla", 2, there, {"triton": ""})
    with pytest.raises(BackendError, match="one row only"):
        backend.pick("fla", 2, there, {"fla": backend.no_fla(torch.zeros(2, 3, dtype=torch.bool))})


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
