"""A state-vector simulator of a few qubits, batched and differentiable: rotations, CNOT, <Z>, and the circuits of the quantum LSTM.

A state is complex [..., 2^n], qubit 0 the most significant bit, as PennyLane has it. A gate touches pairs of amplitudes in place of being
a 2^n x 2^n matrix, and CNOTs are one reordering. Angles broadcast over the leading dimensions, so that independent circuits run together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ShapeError, positive


def qubits_of(psi: Tensor) -> int:
    """n of a state [..., 2^n]. Raises ShapeError if there is none."""
    n = psi.shape[-1].bit_length() - 1
    if not psi.is_complex() or n < 1 or psi.shape[-1] != 1 << n:
        raise ShapeError(f"a state of qubits is complex [..., 2^n]; got {psi.dtype} with shape {list(psi.shape)}.")
    return n


def _pair(psi: Tensor, qubit: int) -> tuple[Tensor, Tensor]:
    """The amplitudes where the qubit is 0 and where it is 1, each [..., 2^qubit, 2^(n - qubit - 1)]."""
    return psi.unflatten(-1, (1 << qubit, 2, -1)).unbind(-2)  # type: ignore[return-value]


def _join(zero: Tensor, one: Tensor) -> Tensor:
    return torch.stack([zero, one], -2).flatten(-3)


def _phase(angle: Tensor) -> Tensor:
    """exp(i angle), [..., 1, 1]."""
    return torch.polar(torch.ones_like(angle), angle)[..., None, None]


def ry(psi: Tensor, theta: Tensor, qubit: int) -> Tensor:
    """exp(-i theta Y / 2) = [[cos, -sin], [sin, cos]] of theta / 2."""
    zero, one = _pair(psi, qubit)
    cos, sin = (theta / 2).cos()[..., None, None], (theta / 2).sin()[..., None, None]
    return _join(cos * zero - sin * one, sin * zero + cos * one)


def rz(psi: Tensor, phi: Tensor, qubit: int) -> Tensor:
    """exp(-i phi Z / 2) = diag(exp(-i phi / 2), exp(i phi / 2))."""
    zero, one = _pair(psi, qubit)
    turn = _phase(phi / 2)
    return _join(turn.conj() * zero, turn * one)


def rot(psi: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, qubit: int) -> Tensor:
    """The general rotation RZ(gamma) RY(beta) RZ(alpha), in one pass."""
    zero, one = _pair(psi, qubit)
    cos, sin = (beta / 2).cos()[..., None, None], (beta / 2).sin()[..., None, None]
    total, apart = _phase((alpha + gamma) / 2), _phase((alpha - gamma) / 2)
    return _join(total.conj() * cos * zero - apart * sin * one, apart.conj() * sin * zero + total * cos * one)


def cnot(psi: Tensor, control: int, target: int) -> Tensor:
    """Flip the target where the control is 1."""
    return psi[..., _cnots(qubits_of(psi), [(control, target)], psi.device)]


def _cnots(n: int, pairs: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Where each amplitude comes from after these CNOTs, one after the other: [2^n] int64."""
    states = torch.arange(1 << n, device=device)
    order = states
    for control, target in pairs:
        order = order[states ^ (states >> (n - 1 - control) & 1) << (n - 1 - target)]
    return order


def ring(n: int, device: torch.device) -> Tensor:
    """Where each amplitude comes from after CNOT i -> i + 1 for every qubit i, then CNOT i -> i + 2, both around the ring: [2^n] int64.

    Those of a qubit with itself (n = 1, and i + 2 where n = 2) are left out.
    """
    return _cnots(n, [(i, (i + reach) % n) for reach in (1, 2) for i in range(n) if reach % n], device)


def layers(psi: Tensor, angles: Tensor) -> Tensor:
    """`depth` times: the CNOTs of `ring`, then a general rotation of every qubit. angles [..., depth, n, 3]."""
    order = ring(qubits_of(psi), psi.device)
    for layer in angles.unbind(-3):
        psi = psi[..., order]
        for qubit, angle in enumerate(layer.unbind(-2)):
            alpha, beta, gamma = angle.unbind(-1)
            psi = rot(psi, alpha, beta, gamma, qubit)
    return psi


def bits(n: int, like: Tensor) -> Tensor:
    """[n, 2^n] in the dtype and on the device of `like`: bit i of every basis state."""
    places = torch.arange(n - 1, -1, -1, device=like.device)[:, None]
    return (torch.arange(1 << n, device=like.device) >> places & 1).to(like.dtype)


def magnitudes_and_phases(v: Tensor, bit: Tensor) -> tuple[Tensor, Tensor]:
    """The product state of `encode` as two real tensors [..., 2^n], its global phase left out; bit: `bits`."""
    n = v.shape[-1]
    half = v.atan() / 2 + math.pi / 4  # RY(theta) H |0> = (cos, sin)(theta / 2 + pi / 4)
    each = torch.stack([half.cos(), half.sin()], -1)  # [..., n, 2]
    size = each[..., 0, :]
    for i in range(1, n):
        size = (size[..., :, None] * each[..., None, i, :]).flatten(-2)
    return size, v.square().atan() @ bit


def encode(v: Tensor) -> Tensor:
    """v [..., n] real -> the state RZ(atan v_i^2) RY(atan v_i) H |0> of every qubit i, up to a global phase."""
    return torch.polar(*magnitudes_and_phases(v, bits(v.shape[-1], v)))


def expect_z(psi: Tensor) -> Tensor:
    """<Z_i> of every qubit, [..., n] real in -1 .. 1."""
    weight = psi.real.square() + psi.imag.square()
    return weight @ (1 - 2 * bits(qubits_of(psi), weight)).T


def circuit(v: Tensor, angles: Tensor) -> Tensor:
    """<Z_i> after `encode` and `layers`, gate by gate: v [..., n] and angles [C, depth, n, 3] -> [..., C, n]."""
    positive(qubits=v.shape[-1])
    if angles.shape[-2:] != (v.shape[-1], 3):
        raise ShapeError(f"angles have shape {list(angles.shape)}; {v.shape[-1]} qubits need [C, depth, {v.shape[-1]}, 3].")
    return expect_z(layers(encode(v)[..., None, :], angles))


class Compiled:
    """`circuit` for fixed angles and many v: two real matrix products a call, whatever the depth.

    The layers act linearly on the amplitudes and do not depend on v: they are run once, on the 2^n basis states, and what they do to the
    real and imaginary parts is one matrix [2 2^n, C 2 2^n]; <Z_i> is linear in the squares. Worth it up to about 8 qubits.
    """

    def __init__(self, angles: Tensor):
        circuits, _, n, _ = angles.shape
        size = 1 << n
        wide = torch.complex128 if angles.dtype == torch.float64 else torch.complex64
        basis = torch.eye(size, dtype=wide, device=angles.device)
        after = layers(basis[:, None], angles)  # [2^n, C, 2^n]: row s is where basis state s goes
        real, imag = after.real, after.imag
        turn = torch.stack([torch.stack([real, imag], -2), torch.stack([-imag, real], -2)])  # [2, 2^n, C, 2, 2^n]
        self.turn = turn.reshape(2 * size, circuits * 2 * size)
        self.bits = bits(n, angles)
        self.signs = (1 - 2 * self.bits).T.repeat(2, 1)  # [2 2^n, n]
        self.circuits = circuits

    def __call__(self, v: Tensor) -> Tensor:
        size, phase = magnitudes_and_phases(v, self.bits)
        psi = torch.cat([size * phase.cos(), size * phase.sin()], -1)
        return (psi @ self.turn).square().unflatten(-1, (self.circuits, -1)) @ self.signs
