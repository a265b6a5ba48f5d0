"""The simulator against matrices made of Kronecker products, and against PennyLane where it is installed."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.errors import RemanenceError, ShapeError
from remanence.ops import qubits

I = torch.eye(2, dtype=torch.complex128)
X = torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128)
Y = torch.tensor([[0, -1j], [1j, 0]], dtype=torch.complex128)
Z = torch.tensor([[1, 0], [0, -1]], dtype=torch.complex128)
H = (X + Z) / 2**0.5


def on(gate: Tensor, qubit: int, n: int) -> Tensor:
    """The matrix of one qubit's gate on all of them."""
    return functools.reduce(torch.kron, [gate if i == qubit else I for i in range(n)])


def turn(pauli: Tensor, angle: Tensor | float) -> Tensor:
    """exp(-i angle / 2 P) = cos(angle / 2) - i sin(angle / 2) P."""
    half = torch.as_tensor(angle, dtype=torch.float64) / 2
    return half.cos() * I - 1j * half.sin() * pauli


def control(a: int, b: int, n: int) -> Tensor:
    """CNOT = |0><0| on a + |1><1| on a times X on b."""
    return on((I + Z) / 2, a, n) + on((I - Z) / 2, a, n) @ on(X, b, n)


def kron_circuit(v: Tensor, angles: Tensor) -> Tensor:
    """<Z_i> of one circuit as the definition has it. v [n], angles [depth, n, 3]."""
    n = len(v)
    psi = torch.zeros(1 << n, dtype=torch.complex128)
    psi[0] = 1
    for i in range(n):
        psi = on(turn(Z, (v[i] ** 2).atan()) @ turn(Y, v[i].atan()) @ H, i, n) @ psi
    for layer in angles:
        for reach in (1, 2):
            for i in range(n):
                if reach % n:
                    psi = control(i, (i + reach) % n, n) @ psi
        for i, (a, b, g) in enumerate(layer):
            psi = on(turn(Z, g) @ turn(Y, b) @ turn(Z, a), i, n) @ psi
    return torch.stack([(psi.conj() @ on(Z, i, n) @ psi).real for i in range(n)])


def random(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_parity_gates_are_kronecker_products() -> None:
    n = 3
    psi = torch.complex(random(4, 8), random(4, 8, seed=1))
    a, b, g = random(3, 4, seed=2)
    for i in range(n):
        want = torch.stack([on(turn(Y, a[r]), i, n) @ psi[r] for r in range(4)])
        assert_parity("qlstm", "Kronecker products, RY", qubits.ry(psi, a, i), want, 1e-13)
        want = torch.stack([on(turn(Z, a[r]), i, n) @ psi[r] for r in range(4)])
        assert_parity("qlstm", "Kronecker products, RZ", qubits.rz(psi, a, i), want, 1e-13)
        want = torch.stack([on(turn(Z, g[r]) @ turn(Y, b[r]) @ turn(Z, a[r]), i, n) @ psi[r] for r in range(4)])
        assert_parity("qlstm", "Kronecker products, rotation", qubits.rot(psi, a, b, g, i), want, 1e-13)
        for j in range(n):
            if i != j:
                assert torch.equal(qubits.cnot(psi, i, j), psi @ control(i, j, n).T)
    norm = psi.abs().square().sum(-1)
    assert_close("norm", qubits.rot(psi, a, b, g, 1).abs().square().sum(-1), norm, 1e-13)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_parity_circuit(n: int) -> None:
    v, angles = random(3, n), random(2, 2, n, 3, seed=1)
    want = torch.stack([torch.stack([kron_circuit(row, one) for one in angles]) for row in v])
    assert_parity("qlstm", "Kronecker products, circuit", qubits.circuit(v, angles), want, 1e-12)
    assert_parity("qlstm", "Kronecker products, compiled circuit", qubits.Compiled(angles)(v), want, 1e-12)
    single = qubits.Compiled(angles.float())(v.float())
    assert_close("float32", single.double(), want, 1e-5)


def test_gradients_of_the_compiled_circuit() -> None:
    v, angles = random(5, 4).requires_grad_(), random(4, 2, 4, 3, seed=1).requires_grad_()
    weight = random(5, 4, 4, seed=2)
    slow = torch.autograd.grad((qubits.circuit(v, angles) * weight).sum(), (v, angles))
    fast = torch.autograd.grad((qubits.Compiled(angles)(v) * weight).sum(), (v, angles))
    assert_gradients_close("compiled", dict(zip("va", fast)), dict(zip("va", slow)), 1e-12)
    assert torch.autograd.gradcheck(qubits.circuit, (random(2, 2).requires_grad_(), random(1, 1, 2, 3, seed=1).requires_grad_()))


def test_parity_pennylane() -> None:
    qml = pytest.importorskip("pennylane")
    v, angles = random(4), random(2, 4, 3, seed=1)

    @qml.qnode(qml.device("default.qubit", wires=4))
    def run():
        for i in range(4):
            qml.Hadamard(i)
            qml.RY(float(v[i].atan()), i)
            qml.RZ(float(v[i].square().atan()), i)
        for layer in angles:
            for reach in (1, 2):
                for i in range(4):
                    qml.CNOT([i, (i + reach) % 4])
            for i in range(4):
                qml.Rot(*map(float, layer[i]), i)
        return [qml.expval(qml.PauliZ(i)) for i in range(4)]

    want = torch.tensor([float(z) for z in run()], dtype=torch.float64)
    assert_parity("qlstm", "PennyLane default.qubit", qubits.circuit(v, angles[None])[0], want, 1e-10)


def test_wrong_use() -> None:
    with pytest.raises(ShapeError, match=r"complex \[..., 2\^n\]"):
        qubits.cnot(torch.zeros(6, dtype=torch.complex64), 0, 1)
    with pytest.raises(ShapeError, match="2 qubits need"):
        qubits.circuit(torch.zeros(2), torch.zeros(1, 1, 3, 3))
    with pytest.raises(RemanenceError, match="qubits is 0"):
        qubits.circuit(torch.zeros(0), torch.zeros(1, 1, 0, 3))
