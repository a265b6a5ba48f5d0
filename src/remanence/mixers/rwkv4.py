"""RWKV-4: time mixing by a decaying softmax average of every channel, and channel mixing; both see the token before (arXiv 2305.13048)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import system
from ..errors import UsageError
from ..ops.backend import accumulate_dtype
from ..ops.expsum import FLOOR, Sums, average, expsum, merge
from ..span import Span, advance
from ..state import State
from .base import Mixer
from .parts import no_decay
from .token_shift import token_shift


class RWKV4State(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    before: Tensor  # [B, 1, D], the last token's x
    largest: Tensor  # [B, D] float32, the largest exponent; FLOOR before any token
    total: Tensor  # [B, D] float32, the sum of weights over exp(largest)
    weighted: Tensor  # [B, D] float32, likewise of weights times values


class RWKV4ChannelState(State):
    seen: Tensor  # [B] int64, tokens read in the current document
    before: Tensor  # [B, 1, D], the last token's x


def depth(layer: int, layers: int) -> tuple[float, float]:
    """l / (L - 1) and 1 - l / L for the layer l = 0 .. L - 1: how far up a layer is, as the initial values count it."""
    if layer > layers:
        raise UsageError(f"layer is {layer}; it must be in 1..{layers}, the number of layers.")
    return (layer - 1) / max(layers - 1, 1), 1 - (layer - 1) / layers


def mix(x: Tensor, previous: Tensor, share: Tensor) -> Tensor:
    """share x_t + (1 - share) x_{t-1}."""
    return torch.lerp(previous, x, share)


@system(
    "rwkv4",
    kind="mixer",
    paper="arXiv:2305.13048",
    year=2023,
    name="RWKV-4 (time mixing)",
    state="4 D",
    parity="transformers RwkvSelfAttention (copied weights) and rwkv_linear_attention_cpu",
    claim="Character-level perplexity on 1 MB of text comparable to a GPT of the same size, with a constant state.",
)
class RWKV4(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is one decaying average of every channel and the last token.

        wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same with v = 1)        w = exp(time_decay), u = time_first
        r, k, v = W (mu x_t + (1 - mu) x_{t-1}), each with its own mu        y = W_o (sigmoid(r) * wkv)

    The bonus u goes to the output only, not into the state. layer, layers: where the mixer stands (1 is the bottom); mu and w start by it.
    With `rwkv4-channel` as the next layer, both without feed-forward, this is an RWKV-4 block but for the norm's kind. init="trainer":
    W_k, W_r and W_o start at zero as in the authors' trainer (from memory); "linear": as torch starts a Linear.
    """

    def __init__(self, dim: int, layer: int = 1, layers: int = 1, init: str = "linear", backend: str = "auto"):
        super().__init__()
        if init not in ("linear", "trainer"):
            raise UsageError(f"init is {init!r}; it may be 'linear' or 'trainer'.")
        self.backend = backend
        up, down = depth(layer, layers)
        channel = torch.arange(dim) / dim
        self.mu_k = nn.Parameter(channel**down)
        self.mu_v = nn.Parameter(channel**down + 0.3 * up)
        self.mu_r = nn.Parameter(channel ** (0.5 * down))
        self.time_decay = no_decay(nn.Parameter(-5 + 8 * (torch.arange(dim) / max(dim - 1, 1)) ** (0.7 + 1.3 * up)))
        zigzag = (torch.arange(dim) + 1) % 3 - 1
        self.time_first = no_decay(nn.Parameter(torch.tensor(0.3).log() + 0.5 * zigzag))
        self.to_r, self.to_k, self.to_v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        if init == "trainer":
            for linear in (self.to_r, self.to_k, self.out):
                nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, state: RWKV4State | None = None, span: Span | None = None) -> tuple[Tensor, RWKV4State]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        dtype = accumulate_dtype(x)
        previous, before = token_shift(x, state and state.before, span)
        k = self.to_k(mix(x, previous, self.mu_k)).to(dtype)  # [B, T, D]
        v = self.to_v(mix(x, previous, self.mu_v)).to(dtype)
        r = self.to_r(mix(x, previous, self.mu_r)).sigmoid()
        if state:
            initial = state.largest.detach(), state.total, state.weighted[..., None]
        else:
            zero = torch.zeros_like(k[:, 0])
            initial = zero + FLOOR, zero, zero[..., None]
        sums, (m, total, weighted) = expsum(k, v[..., None], -self.time_decay.to(dtype).exp(), initial, span, self.backend)
        _, den, num = merge(self._before(sums, initial, span), (k + self.time_first.to(dtype), torch.ones_like(k), v[..., None]))
        y = self.out(r * average(den, num)[..., 0].to(x.dtype))
        seen = advance(seen, x.shape[1], span)
        return y, RWKV4State(seen=seen, before=before, largest=m, total=total, weighted=weighted[..., 0])

    @staticmethod
    def _before(sums: Sums, initial: Sums, span: Span | None) -> Sums:
        """The sums that each token finds: those after the token before it, none at a document's start."""
        m, den, num = (torch.cat([first[:, None], after[:, :-1]], 1) for first, after in zip(initial, sums))
        if span is not None and span.reset is not None:
            start = span.reset[..., None]
            m, den, num = m.masked_fill(start, FLOOR), den.masked_fill(start, 0), num.masked_fill(start[..., None], 0)
        return m, den, num


@system(
    "rwkv4-channel",
    kind="mixer",
    paper="arXiv:2305.13048",
    year=2023,
    name="RWKV-4 (channel mixing)",
    state="D",
    parity="transformers RwkvFeedForward (copied weights)",
    claim="The other half of an RWKV-4 block: a feed-forward that sees the token before.",
)
class RWKV4Channel(Mixer):
    """x [B, T, dim] -> y [B, T, dim]; the state is the last token.

        y = sigmoid(r) * W_o relu(k)^2        r, k = W (mu x_t + (1 - mu) x_{t-1}), each with its own mu, started at (h / D)^(1 - l / L)

    hidden: the width of k, default 4 dim. In a Decoder it is a layer of its own: [{"mixer": "rwkv4", "ffn": 0}, {"mixer":
    "rwkv4-channel", "ffn": 0}]. In fp16 the square may overflow. init as `rwkv4`.
    """

    def __init__(self, dim: int, hidden: int | None = None, layer: int = 1, layers: int = 1, init: str = "linear"):
        super().__init__()
        if init not in ("linear", "trainer"):
            raise UsageError(f"init is {init!r}; it may be 'linear' or 'trainer'.")
        inner = hidden or 4 * dim
        _, down = depth(layer, layers)
        self.mu_k, self.mu_r = (nn.Parameter((torch.arange(dim) / dim) ** down) for _ in range(2))
        self.to_k, self.to_r, self.out = (
            nn.Linear(dim, inner, bias=False),
            nn.Linear(dim, dim, bias=False),
            nn.Linear(inner, dim, bias=False),
        )
        if init == "trainer":
            for linear in (self.to_r, self.out):
                nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, state: RWKV4ChannelState | None = None, span: Span | None = None) -> tuple[Tensor, RWKV4ChannelState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        previous, before = token_shift(x, state and state.before, span)
        k = self.to_k(mix(x, previous, self.mu_k)).relu().square()
        r = self.to_r(mix(x, previous, self.mu_r)).sigmoid()
        return r * self.out(k), RWKV4ChannelState(seen=advance(seen, x.shape[1], span), before=before)
