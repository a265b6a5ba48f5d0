"""LMUFormer: a patch embedding, Legendre memory blocks and a channel mixer that classify a stream of frames (arXiv 2402.04882)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError
from ...mixers.base import Mixer
from ...ops.backend import accumulate_dtype
from ...ops.lti import dense
from ...ops.lti.hippo import discretize, hippo
from ...ops.scan import scan
from ...span import Span, last_inputs, positions
from ...state import State


class LMUFormerState(State):
    seen: Tensor  # [B] int64, frames read in the current recording
    total: Tensor  # [B, classes] float32, sum of the frames' scores
    parts: tuple  # of every layer with a state, in the order they run: tails of convolutions, memories, voltages


class Spike(torch.autograd.Function):
    """1 where x >= 0, else 0; its gradient is that of sigmoid(4 x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = torch.sigmoid(4 * x)
        return grad * 4 * slope * (1 - slope)


class LIF(nn.Module):
    """Leaky integrate-and-fire, frame by frame: v <- v + (x - v) / tau, a spike where v >= threshold, which sets v to 0.

    No gradient goes through the setting to 0. x [B, T, C] -> spikes [B, T, C]; its state is v [B, C].
    """

    def __init__(self, tau: float = 2.0, threshold: float = 1.0):
        super().__init__()
        self.tau, self.threshold = tau, threshold

    def forward(self, x: Tensor, v: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        now, spikes = x.new_zeros(x.shape[0], x.shape[2]) if v is None else v, []
        for t in range(x.shape[1]):
            if span is not None and span.reset is not None:
                now = torch.where(span.reset[:, t, None], 0.0, now)
            charged = now + (x[:, t] - now) / self.tau
            spike = Spike.apply(charged - self.threshold)
            new = charged * (1 - spike.detach())
            now = new if span is None or span.valid is None else torch.where(span.valid[:, t, None], new, now)
            spikes.append(spike)
        return torch.stack(spikes, 1), now


class FrameNorm(nn.BatchNorm1d):
    """Batch normalisation of x [B, T, C] over all real frames: a fixed scale and shift in eval mode, where streams are read."""

    def forward(self, x: Tensor, span: Span | None = None) -> Tensor:  # type: ignore[override]
        if span is None or span.valid is None:
            return super().forward(x.flatten(0, 1)).view_as(x)
        y = torch.zeros_like(x)
        if bool(span.valid.any()):
            y[span.valid] = super().forward(x[span.valid])
        return y


class CausalConv(nn.Module):
    """Convolution of x [B, T, C] over the last 3 frames of a recording, all channels; its state is the last 2 [B, 2, C]."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.taps = nn.Linear(3 * channels, out, bias=False)  # oldest frame first

    def forward(self, x: Tensor, before: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        before = x.new_zeros(x.shape[0], 2, x.shape[2]) if before is None else before
        both = torch.cat([before, x], 1)
        frames = [both[:, j : j + length] for j in range(3)]
        if span is not None and span.reset is not None:
            at = torch.arange(length, device=x.device)
            age = at - torch.where(span.reset, at, -3).cummax(1).values
            frames = [frame * (age >= 2 - j)[..., None].to(x.dtype) for j, frame in enumerate(frames)]
        return self.taps(torch.cat(frames, -1)), last_inputs(before, x, span)


class Legendre(nn.Module):
    """m_t = Abar m_{t-1} + Bbar u_t for u [B, T, 1]: [B, T, q], the Legendre memory of the last theta frames; its state is m [B, 1, q]."""

    def __init__(self, order: int, theta: float):
        super().__init__()
        self.A, self.B = discretize(*hippo("lmu", order, theta), 1.0, "zoh")  # not buffers: they must keep their digits

    def forward(self, u: Tensor, m: Tensor | None, span: Span | None) -> tuple[Tensor, Tensor]:
        y, last = dense(self.A.to(u.device), self.B.to(u.device), u, None, m, span)
        return y[:, :, 0], last


class Thread:
    """Hands every layer its part of the state, in the order in which they run, and keeps the new parts."""

    def __init__(self, parts: tuple[Tensor, ...] | None, span: Span | None):
        self.given, self.span = None if parts is None else iter(parts), span
        self.parts: list[Tensor] = []

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        y, new = layer(x, None if self.given is None else next(self.given), self.span)
        self.parts.append(new)
        return y


class Embedding(nn.Module):
    """Four convolutions with ReLU and norm (spiking: norm and LIF), and one more added to what it reads."""

    def __init__(self, features: int, width: int, spiking: bool):
        super().__init__()
        self.spiking = spiking
        self.convs = nn.ModuleList(CausalConv(width if layer else features, width) for layer in range(4))
        self.norms = nn.ModuleList(FrameNorm(width) for _ in range(4))
        self.lifs = nn.ModuleList(LIF() for _ in range(4))
        self.position = CausalConv(width, width)

    def forward(self, x: Tensor, run: Thread) -> Tensor:
        raw = x
        for conv, norm, lif in zip(self.convs, self.norms, self.lifs):
            raw = run(conv, x)
            x = run(lif, norm(raw, run.span)) if self.spiking else norm(F.relu(raw), run.span)
        return (raw if self.spiking else x) + run(self.position, x)


class Block(nn.Module):
    """x <- x + norm(W_p LMU(x)), x <- x + mix(x); the spiking one sends spikes through every matrix and adds what comes out."""

    def __init__(self, width: int, order: int, theta: float, expansion: int, spiking: bool):
        super().__init__()
        self.spiking = spiking
        self.to_u, self.to_h, self.project = nn.Linear(width, 1), nn.Linear(order + width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, expansion * width), nn.Linear(expansion * width, width)
        self.memory, self.norm = Legendre(order, theta), FrameNorm(width)
        wide = expansion * width
        self.norm_up, self.norm_down = (FrameNorm(width), FrameNorm(wide)) if spiking else (FrameNorm(wide), FrameNorm(width))
        if spiking:
            self.norm_x, self.norm_u, self.norm_m, self.norm_h = FrameNorm(width), FrameNorm(1), FrameNorm(order), FrameNorm(width)
            self.fire_x = LIF(threshold=0.5)
            self.fire_u, self.fire_m, self.fire_h, self.fire_up, self.fire_down = (LIF() for _ in range(5))

    def forward(self, x: Tensor, run: Thread) -> Tensor:
        span = run.span
        if not self.spiking:
            m = run(self.memory, F.relu(self.to_u(x)))
            h = F.relu(self.to_h(torch.cat([m, x], -1)))
            x = x + self.norm(self.project(h), span)
            return x + F.relu(self.norm_down(self.down(F.gelu(self.norm_up(self.up(x), span))), span))
        s = run(self.fire_x, self.norm_x(x, span))
        u = run(self.fire_u, self.norm_u(self.to_u(s), span))
        m = run(self.fire_m, self.norm_m(run(self.memory, u), span))
        h = run(self.fire_h, self.norm_h(self.to_h(torch.cat([m, s], -1)), span))
        x = x + self.norm(self.project(h), span)
        hidden = run(self.fire_down, self.norm_down(self.up(run(self.fire_up, self.norm_up(x, span))), span))
        return x + self.down(hidden)


class LMUFormer(Mixer):
    """Frames x [B, T, dim] -> scores [B, T, classes], the mean of a linear head over the recording so far; the last is the paper's.

    Embedding, `depth` blocks, head. It streams: every layer's state is part of the state, so a recording may come in any pieces, several
    may be packed in a row, and every frame has its answer. The convolutions are causal for that, where the published ones look one frame
    ahead each. Batch norms make training calls depend on the batch; the laws hold in eval mode.

    width: channels (256). order: q of the memory, default width (twice that if spiking, as in the published code). theta: frames that it
    spans. spiking: every activation is a spike of a leaky integrate-and-fire neuron, trained through a surrogate gradient, with norms
    before them and residuals of real numbers (the published "ms" variant); a loop over frames.
    """

    slug = "lmuformer-classifier"

    def __init__(
        self,
        dim: int,
        classes: int = 35,
        width: int = 256,
        depth: int = 1,
        order: int | None = None,
        theta: float = 128.0,
        expansion: int = 4,
        spiking: bool = False,
    ):
        super().__init__()
        if not theta >= 1:
            raise UsageError(f"theta is {theta}; it must be at least 1, the length in frames of what is remembered.")
        self.spiking = spiking
        order = order or (2 * width if spiking else width)
        self.embedding = Embedding(dim, width, spiking)
        self.blocks = nn.ModuleList(Block(width, order, theta, expansion, spiking) for _ in range(depth))
        self.head_norm, self.head_fire = (FrameNorm(width), LIF()) if spiking else (None, None)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, state: LMUFormerState | None = None, span: Span | None = None) -> tuple[Tensor, LMUFormerState]:
        seen = state.seen if state else torch.zeros(len(x), dtype=torch.long, device=x.device)
        at = positions(seen, x.shape[1], span)
        run = Thread(None if state is None else state.parts, span)
        h = self.embedding(x, run)
        for block in self.blocks:
            h = block(h, run)
        if self.head_norm is not None and self.head_fire is not None:
            h = run(self.head_fire, self.head_norm(h, span))
        scores = self.head(h).to(accumulate_dtype(x))
        total, last = scan(torch.zeros_like(scores), scores, state and state.total, span)
        mean = total / (at[..., None].clamp(min=0) + 1)
        return mean.to(x.dtype), LMUFormerState(seen=at[:, -1] + 1, total=last, parts=tuple(run.parts))
