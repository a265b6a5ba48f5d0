"""Long causal convolution by FFT."""

from __future__ import annotations

import torch
from torch import Tensor


def convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum_{s <= t} kernel_{t-s} u_s for u [B, T, D] and kernel [D, T], both padded to 2 T so that nothing wraps around."""
    size = 2 * u.shape[1]
    spectrum = torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(kernel, n=size, dim=1).mT
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, : u.shape[1]]
