"""VSSM: a variational autoencoder over sequences, made of state spaces, that draws a sequence in one pass (2407.08415)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import system
from ..errors import ShapeError, UsageError, positive, unknown
from ..mixers.base import check_state, config_digest
from ..mixers.parts import RMSNorm
from ..span import Span, advance
from ..state import State
from .decoder import Block, Layers, parse_layers

LIKELIHOODS = ("bernoulli", "gaussian", "categorical")
LOG_VARIANCE = 10.0
"""Log variances of latents stay within +- this: far from it in use, and no overflow on the way."""


class VSSMState(State):
    seen: Tensor  # [B] int64, steps observed or generated in the current sequence
    prior: tuple  # the prior's mixers' states, bottom up; empty with the fixed prior
    decoder: tuple  # the decoder's mixers' states, bottom up


@dataclass(frozen=True)
class Normal:
    """Independent normal distributions, mean and log variance [B, T, latent]."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + sigma * noise: gradients flow through the sample."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self, prior: Normal) -> Tensor:
        """KL(self || prior), summed over the last dimension, [B, T]."""
        gap = (self.mean - prior.mean).square() + self.log_variance.exp()
        return 0.5 * (prior.log_variance - self.log_variance + gap / prior.log_variance.exp() - 1).sum(-1)


@dataclass(frozen=True)
class VSSMOutput:
    """loss: -(log_likelihood - beta kl), mean over the batch and per scored step. log_likelihood, kl: sums over time, [B]; logits, see
    `VSSM.decode`; posterior, prior: of the latents."""

    loss: Tensor
    log_likelihood: Tensor
    kl: Tensor
    logits: Tensor
    posterior: Normal
    prior: Normal

    @property
    def elbo(self) -> Tensor:
        """The bound on log p(x), or log p(what is not observed | what is), in nats, [B]."""
        return self.log_likelihood - self.kl


class Stack(nn.Module):
    """h [B, T, dim] -> blocks of mixers -> norm, with the mixers' states as a tuple."""

    def __init__(self, dim: int, layers: Layers, ffn: float):
        super().__init__()
        specs = parse_layers(layers)
        self.blocks = nn.ModuleList(Block(dim, spec, ffn, 1e-5, layer, len(specs)) for layer, spec in enumerate(specs, start=1))
        self.norm = RMSNorm(dim)

    def forward(self, h: Tensor, states: tuple[State, ...] = (), span: Span | None = None) -> tuple[Tensor, tuple[State, ...]]:
        new = []
        for index, block in enumerate(self.blocks):
            h, state = block(h, states[index] if states else None, span)
            new.append(state)
        return self.norm(h), tuple(new)


def beta_warmup(step: int, steps: int, top: float = 1.0) -> float:
    """top * step / steps, then top: latents are learned before they are paid for, which keeps the posterior from collapsing."""
    return top * min(1.0, step / steps) if steps else top


@system(
    "vssm", kind="training", paper="arXiv:2407.08415", year=2024, name="VSSM, AR-VSSM",
    state="that of the decoder's (and, with a learned prior, the prior's) mixers", parity="torch.distributions' KL; one pass = streaming",
    claim="Sequential MNIST: samples in one parallel pass where an autoregressive model takes 784",
)  # fmt: skip
class VSSM(nn.Module):
    """x [B, T, channels] (ids [B, T] if categorical) -> VSSMOutput. Encoder, prior and decoder are stacks of any mixers of the catalog.

        q(z_t | x) = N(mu_t, sigma_t) from the encoder, which reads both ways        p(x_t | z_{<= t}) from the decoder, a causal scan
        VSSM     p(z_t) = N(0, 1)
        AR-VSSM  p(z_t | x_{<c}) = N from the prior, a causal scan of the first c steps and of blanks from there on
        loss = -sum_{t >= c} log p(x_t | z) + beta KL(q || p)

    likelihood: "bernoulli" (x in 0..1), "gaussian" (a learned scale a channel) or "categorical" (channels: number of symbols). layers:
    see `parse_layers`, of encoder and decoder (each way of the encoder has its own); prior: layers of the learned prior, None for N(0, 1).
    The decoder never reads x, so sequences of any length are drawn in one pass, and generation resumes from its state.

    Our reading of the paper, where its details are uncertain: what the prior reads from step c on is one learned vector; the observed part
    is not scored, so that the bound is on log p(x_{>= c} | x_{< c}); means and log variances are linear in the stacks' outputs.
    """

    def __init__(
        self, channels: int = 1, likelihood: str = "bernoulli", latent: int = 16, dim: int = 64, layers: Layers = "2 x s4d",
        prior: Layers | None = None, ffn: float = 2.0,
    ):  # fmt: skip
        super().__init__()
        positive(channels=channels, latent=latent, dim=dim)
        if likelihood not in LIKELIHOODS:
            raise unknown("likelihood", likelihood, LIKELIHOODS)
        self.config: dict[str, Any] = {
            "channels": channels, "likelihood": likelihood, "latent": latent, "dim": dim, "layers": parse_layers(layers),
            "prior": None if prior is None else parse_layers(prior), "ffn": ffn,
        }  # fmt: skip
        self.header = "vssm", config_digest("vssm", self.config)
        self.channels, self.likelihood, self.latent = channels, likelihood, latent
        self.embed = nn.Embedding(channels, dim) if likelihood == "categorical" else nn.Linear(channels, dim)
        self.forth, self.back = Stack(dim, layers, ffn), Stack(dim, layers, ffn)
        self.to_posterior = nn.Linear(2 * dim, 2 * latent)
        self.prior = None if prior is None else Stack(dim, prior, ffn)
        if self.prior is not None:
            self.blank = nn.Parameter(0.02 * torch.randn(dim))
            self.to_prior = nn.Linear(dim, 2 * latent)
        self.from_latent = nn.Linear(latent, dim)
        self.decoder = Stack(dim, layers, ffn)
        self.head = nn.Linear(dim, channels)
        self.log_scale = nn.Parameter(torch.zeros(channels)) if likelihood == "gaussian" else None

    def forward(
        self, x: Tensor, span: Span | None = None, observed: Tensor | int = 0, beta: float = 1.0, noise: Tensor | None = None
    ) -> VSSMOutput:
        """observed: c, the steps of each row [B] (or of all) that the prior is told, 0 with the fixed prior. noise [B, T, latent]: standard
        normal, drawn if None. Padding in `span` counts for nothing. Raises ShapeError on x of another shape, UsageError on a reset."""
        h = self._embedded(x)
        batch, length, _ = h.shape
        valid = torch.ones(batch, length, dtype=torch.bool, device=h.device)
        if span is not None:
            span.check(batch, length)
            if span.reset is not None:
                raise UsageError("span has resets; the encoder reads both ways, so give every sequence a row of its own.")
            valid = valid if span.valid is None else span.valid
        c = torch.as_tensor(observed, device=h.device).expand(batch)
        if bool((c < 0).any()) or (self.prior is None and bool((c > 0).any())):
            raise UsageError(f"observed is {c.tolist()}; it must be >= 0, and 0 without a learned prior.")
        at = valid.cumsum(1) - 1  # index among the row's real steps
        posterior = self._posterior(h, span)
        prior, _ = self._prior(h, at < c[:, None], (), span)
        z = posterior.sample(self._noise(noise, posterior.mean))
        logits, _ = self.decode(z, span=span)
        scored = valid & (at >= c[:, None])
        log_likelihood = torch.where(scored, self.log_prob(logits, x), 0).sum(1)
        kl = torch.where(valid, posterior.kl(prior), 0).sum(1)
        loss = (beta * kl - log_likelihood).sum() / scored.sum().clamp(min=1)
        return VSSMOutput(loss, log_likelihood, kl, logits, posterior, prior)

    def decode(self, z: Tensor, states: tuple[State, ...] = (), span: Span | None = None) -> tuple[Tensor, tuple[State, ...]]:
        """z [B, T, latent] -> what x is drawn from, [B, T, channels] (logits, or a gaussian's means), and the decoder's states."""
        h, states = self.decoder(self.from_latent(z), states, span)
        return self.head(h), states

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        """log p(x_t | logits_t) summed over the channels, [B, T]."""
        if self.likelihood == "categorical":
            return -F.cross_entropy(logits.transpose(1, 2), x, reduction="none")
        if self.log_scale is None:
            return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
        gap = (x - logits) / self.log_scale.exp()
        return -(0.5 * gap.square() + self.log_scale + 0.5 * math.log(2 * math.pi)).sum(-1)

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x from p(x | logits): what the model's input looks like."""
        if self.likelihood == "categorical":
            flat = logits.softmax(-1).flatten(0, 1).multinomial(1, generator=generator)
            return flat.reshape(logits.shape[:2])
        if self.log_scale is None:
            return logits.sigmoid().bernoulli(generator=generator)
        noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
        return logits + self.log_scale.exp() * noise

    def generate(
        self, length: int, batch: int = 1, state: VSSMState | None = None, noise: Tensor | None = None, observed: Tensor | None = None
    ) -> tuple[Tensor, VSSMState]:
        """(logits [B, length, channels], state) of the next `length` steps, in one pass; in pieces it is the same for the same noise.

        observed: those steps' x (ids), where they are known and the model is to be told: the call then reads them, `length` must be
        theirs, and the next call continues. batch counts only where neither state nor observed says how many rows there are. Raises
        UsageError if steps are observed and the prior is not learned, StateError on another's state.
        """
        positive(length=length, batch=batch)
        if observed is not None:
            if self.prior is None:
                raise UsageError("steps are observed; a VSSM with the prior N(0, 1) cannot be told any. Build it with prior=layers.")
            if observed.shape[1] != length:
                raise ShapeError(f"observed has {observed.shape[1]} steps and length is {length}; they must agree.")
        batch = state.batch if state else batch if observed is None else len(observed)
        weight = self.head.weight
        if state is not None:
            check_state(state, self.header, batch if observed is None else len(observed), weight.device)
        h = weight.new_zeros(batch, length, weight.shape[1]) if observed is None else self._embedded(observed)
        told = torch.full((batch, length), observed is not None, device=weight.device)
        prior, prior_states = self._prior(h, told, state.prior if state else ())
        z = prior.sample(self._noise(noise, prior.mean))
        logits, states = self.decode(z, state.decoder if state else ())
        seen = state.seen if state else torch.zeros(batch, dtype=torch.long, device=weight.device)
        return logits, VSSMState(seen=advance(seen, length, None), prior=prior_states, decoder=states).stamp(*self.header)

    def _embedded(self, x: Tensor) -> Tensor:
        if self.likelihood == "categorical":
            if x.ndim != 2 or x.dtype != torch.int64 or not x.numel() or not (int(x.min()) >= 0 and int(x.max()) < self.channels):
                raise ShapeError(f"x is {x.dtype} with shape {list(x.shape)}; expected int64 [B, T] of symbols 0..{self.channels - 1}.")
        elif x.ndim != 3 or x.shape[2] != self.channels or not x.numel():
            raise ShapeError(f"x has shape {list(x.shape)}; expected [B, T, {self.channels}], T >= 1.")
        return self.embed(x)

    def _normal(self, numbers: Tensor) -> Normal:
        mean, log_variance = numbers.chunk(2, -1)
        return Normal(mean, log_variance.clamp(-LOG_VARIANCE, LOG_VARIANCE))

    def _noise(self, noise: Tensor | None, like: Tensor) -> Tensor:
        if noise is None:
            return torch.randn_like(like)
        if noise.shape != like.shape:
            raise ShapeError(f"noise has shape {list(noise.shape)}; expected [B, T, latent] = {list(like.shape)}.")
        return noise

    def _posterior(self, h: Tensor, span: Span | None) -> Normal:
        forth, _ = self.forth(h, (), span)
        flipped = None if span is None or span.valid is None else Span(span.valid.flip(1))
        back, _ = self.back(h.flip(1), (), flipped)
        return self._normal(self.to_posterior(torch.cat([forth, back.flip(1)], -1)))

    def _prior(self, h: Tensor, told: Tensor, states: tuple[State, ...], span: Span | None = None) -> tuple[Normal, tuple[State, ...]]:
        """What the latents are before x is seen; told [B, T]: which steps of h [B, T, dim] the prior may read."""
        if self.prior is None:
            zeros = h.new_zeros(*h.shape[:2], self.latent)
            return Normal(zeros, zeros), ()
        h, states = self.prior(torch.where(told[..., None], h, self.blank), states, span)
        return self._normal(self.to_prior(h)), states
