"""HiPPO matrices, their discretisations, and the diagonal-plus-low-rank form of LegS with its Cauchy kernel. All in float64.

Sources: HiPPO (arXiv 2008.07669), LSSL (2110.13985), S4 (2111.00396), LMU (NeurIPS 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UsageError

MEASURES = ("legs", "legt", "lagt", "lmu")
METHODS = ("bilinear", "zoh", "euler")


def hippo(measure: str, order: int, theta: float = 1.0) -> tuple[Tensor, Tensor]:
    """A [N, N] and B [N] of x' = A x + B u, the memory of one of the MEASURES.

        legs  A = -sqrt(2n+1) sqrt(2k+1) below the diagonal, -(n+1) on it;  B = sqrt(2n+1)        all of the past, scaled
        legt  A = -sqrt(2n+1) sqrt(2k+1) (1 if n >= k else (-1)^(n-k)) / theta                    the last theta
        lagt  A = -1 below the diagonal, -1/2 on it;  B = 1                                       the past, fading exponentially
        lmu   A = (2n+1) (-1 if n < k else (-1)^(n-k+1)) / theta;  B = (2n+1) (-1)^n / theta      legt in the LMU's scaling

    Raises UsageError on an unknown measure.
    """
    if measure not in MEASURES:
        raise UsageError(f"measure is {measure!r}; it may be {', '.join(MEASURES)}.")
    n = torch.arange(order, dtype=torch.float64)
    row, column = n[:, None], n[None]
    sign = 1 - 2 * ((row - column).abs() % 2)
    if measure == "lagt":
        return torch.eye(order, dtype=torch.float64) / 2 - torch.ones(order, order, dtype=torch.float64).tril(), torch.ones_like(n)
    root = (2 * n + 1).sqrt()
    if measure == "legs":
        return -(root[:, None] * root).tril() + torch.diag(n), root
    if measure == "legt":
        return -root[:, None] * root * torch.where(row >= column, 1.0, sign) / theta, root / theta
    return (2 * row + 1) * torch.where(row < column, -1.0, -sign) / theta, (2 * n + 1) * (1 - 2 * (n % 2)) / theta


def discretize(a: Tensor, b: Tensor, dt: Tensor | float, method: str = "bilinear", alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """(Abar, Bbar) of m_t = Abar m_{t-1} + Bbar u_t at step dt (a number, or one for each of D systems: [D, N, N] and [D, N]).

        bilinear  Abar = (I - alpha dt A)^-1 (I + (1 - alpha) dt A)        Bbar = (I - alpha dt A)^-1 dt B
        zoh       Abar = exp(dt A)        Bbar = A^-1 (Abar - I) B, taken from one exponential so that A may be singular
        euler     Abar = I + dt A         Bbar = dt B

    alpha: 1/2 is the trapezoidal rule, 1 backward Euler. Differentiable in everything. Raises UsageError on an unknown method.
    """
    if method not in METHODS:
        raise UsageError(f"method is {method!r}; it may be {', '.join(METHODS)}.")
    dt = torch.as_tensor(dt, dtype=a.dtype, device=a.device)
    a, b = a * dt[..., None, None], b * dt[..., None]
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    if method == "euler":
        return one + a, b
    if method == "zoh":
        top = torch.cat([a, b[..., None].expand(*a.shape[:-1], 1)], -1)
        whole = torch.matrix_exp(torch.cat([top, torch.zeros_like(top[..., :1, :])], -2))
        return whole[..., :-1, :-1], whole[..., :-1, -1]
    both = torch.cat([one + (1 - alpha) * a, b[..., None]], -1)
    solved = torch.linalg.solve(one - alpha * a, both)
    return solved[..., :-1], solved[..., -1]


def nplr_legs(order: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LegS as normal plus low rank, A = V (diag(lam) - p p*) V*: lam, p, B in that basis [N / 2] and V [N, N / 2], complex128.

    A + p p^T with p_n = sqrt(n + 1/2) is -1/2 plus a skew-symmetric matrix, so its eigenvalues are -1/2 + i w in conjugate pairs; of each
    pair the one with w > 0 is kept. order must be even.
    """
    if order % 2:
        raise UsageError(f"order is {order}; it must be even, for conjugate pairs.")
    a, b = hippo("legs", order)
    p = (torch.arange(order, dtype=torch.float64) + 0.5).sqrt()
    skew = a + p[:, None] * p + 0.5 * torch.eye(order, dtype=torch.float64)
    w, v = torch.linalg.eigh(-1j * skew)
    w, v = w[order // 2 :], v[:, order // 2 :]
    inverse = v.mH
    return torch.complex(torch.full_like(w, -0.5), w), inverse @ p.to(v.dtype), inverse @ b.to(v.dtype), v


def dplr_step(lam: Tensor, p: Tensor, b: Tensor, dt: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """One bilinear step of x' = (diag(lam) - p p*) x + b u in O(N), by the Woodbury identity.

    lam, p, b [D, M] complex, half of conjugate pairs (so p* x is 2 Re p^H x); dt [D]; x [..., D, M]; u [..., D].
    """
    half = dt[:, None] / 2

    def project(z: Tensor) -> Tensor:
        return 2 * (p.conj() * z).sum(-1, keepdim=True).real

    inverse = 1 / (1 - half * lam)
    forward = x + half * (lam * x - p * project(x)) + 2 * half * b * u[..., None]
    solved, low = inverse * forward, inverse * p
    return solved - low * (half * project(solved) / (1 + half * project(low)))


def dplr_dense(lam: Tensor, p: Tensor, b: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """The bilinear Abar [D, N, N] and Bbar [D, N] of `dplr_step`, real, for the state [Re x, Im x] of N = 2 M numbers."""
    modes = lam.shape[-1]
    eye = torch.eye(modes, dtype=lam.dtype, device=lam.device)
    basis = torch.cat([eye, 1j * eye])[:, None]  # [N, 1, M]
    moved = dplr_step(lam, p, b, dt, basis, dt.new_zeros(2 * modes, 1))  # [N, D, M]
    pulse = dplr_step(lam, p, b, dt, torch.zeros_like(lam), torch.ones_like(dt))
    return torch.cat([moved.real, moved.imag], -1).permute(1, 2, 0), torch.cat([pulse.real, pulse.imag], -1)


def dplr_kernel(lam: Tensor, p: Tensor, b: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
    """K_l = 2 Re C Abar^l Bbar for l < length, [D, length], from its values at the roots of unity z: a Cauchy product a frequency.

        Khat(z) = 2 (c R b - (1 + z) c R p (1 + (1 + z) p* R p)^-1 p* R b)        R = 1 / ((2 / dt) (1 - z) - (1 + z) lam)
        c = C (I - Abar^length)        K = irfft(Khat)

    This form, with 1 + z multiplied into R, is finite at z = -1 too. lam, p, b, c [D, M] complex, half of conjugate pairs; dt [D].
    """
    abar, _ = dplr_dense(lam, p, b, dt)
    real = torch.cat([c.real, -c.imag], -1)[:, None]  # C in the real basis, [D, 1, N]
    left = (real - real @ torch.linalg.matrix_power(abar, length))[:, 0]
    c = torch.complex(*left.chunk(2, -1)) .conj()
    omega = torch.arange(length // 2 + 1, device=lam.device, dtype=dt.dtype) * (-2 * torch.pi / length)
    z = torch.polar(torch.ones_like(omega), omega)
    scale = 2 / dt[:, None] * (1 - z)  # [D, F]

    def cauchy(x: Tensor) -> Tensor:
        """sum over both halves of the pairs of x / (scale - (1 + z) lam); x [K, D, M] -> [K, D, F]."""
        upper = 1 / (scale[..., None] - (1 + z)[:, None] * lam[:, None])  # [D, F, M]
        lower = 1 / (scale[..., None] - (1 + z)[:, None] * lam.conj()[:, None])
        return torch.einsum("kdm,dfm->kdf", x, upper) + torch.einsum("kdm,dfm->kdf", x.conj(), lower)

    cb, cp, pb, pp = cauchy(torch.stack([c * b, c * p, p.conj() * b, p.conj() * p]))
    spectrum = 2 * (cb - (1 + z) * cp * pb / (1 + (1 + z) * pp))
    return torch.fft.irfft(spectrum, n=length, dim=-1)
