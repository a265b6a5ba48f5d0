"""VSSM: its bound, its KL, padding, generation in one pass and in pieces, and states that are values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.distributions import Bernoulli, Independent, kl_divergence
from torch.distributions import Normal as Gaussian

import remanence as rm
from helpers import assert_close, assert_states_close, cuts, pieces
from parity import assert_parity
from remanence import Span, State
from remanence.models.vssm import VSSM, Normal, beta_warmup

T = 12


def build(**hyper: object) -> VSSM:
    torch.manual_seed(0)
    options = {"channels": 2, "latent": 3, "dim": 16, "layers": "1 x s4d, 1 x mingru"} | hyper
    model = rm.find("vssm").builder(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def data(likelihood: str, batch: int = 3, length: int = T) -> Tensor:
    torch.manual_seed(1)
    if likelihood == "categorical":
        return torch.randint(2, (batch, length))
    x = torch.randn(batch, length, 2, dtype=torch.float64)
    return x if likelihood == "gaussian" else (x > 0).double()


def test_parity_of_the_kl_with_torch_distributions() -> None:
    torch.manual_seed(0)
    mean, log_variance, other_mean, other = torch.randn(4, 2, 5, 3, dtype=torch.float64)
    got = Normal(mean, log_variance).kl(Normal(other_mean, other))
    q, p = (Independent(Gaussian(m, (0.5 * v).exp()), 1) for m, v in ((mean, log_variance), (other_mean, other)))
    assert_parity("vssm", "torch.distributions.kl_divergence", got, kl_divergence(q, p), 1e-12)


@pytest.mark.parametrize("prior", [None, "1 x mingru"])
def test_parity_of_the_bound_with_torch_distributions(prior: str | None) -> None:
    model, x, noise = build(prior=prior), data("bernoulli"), torch.randn(3, T, 3, dtype=torch.float64)
    observed = torch.tensor([0, 4, T]) if prior else 0
    out = model(x, observed=observed, noise=noise, beta=0.5)
    q, p = (Independent(Gaussian(n.mean, (0.5 * n.log_variance).exp()), 1) for n in (out.posterior, out.prior))
    logits, _ = model.decode(q.mean + noise * (0.5 * out.posterior.log_variance).exp())
    scored = torch.arange(T) >= torch.as_tensor(observed).reshape(-1, 1)
    likelihood = (Independent(Bernoulli(logits=logits), 1).log_prob(x) * scored).sum(1)
    kl = kl_divergence(q, p).sum(1)
    assert_parity("vssm", "the bound by torch.distributions", out.elbo, likelihood - kl, 1e-11)
    count = scored.expand(3, -1).sum()
    assert_close("loss", out.loss, (0.5 * kl - likelihood).sum() / count, 1e-11)
    if prior is None:
        assert not out.prior.mean.any() and not out.prior.log_variance.any()
    else:
        assert_close("all told", out.log_likelihood[2], torch.zeros((), dtype=torch.float64), 1e-12)


def test_the_bound_is_a_bound() -> None:
    """One step: p(x) by quadrature over the one latent is above the mean of the bound, and importance weights give it exactly."""
    model = build(channels=1, latent=1)
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    z = torch.linspace(-8, 8, 801, dtype=torch.float64)
    logits, _ = model.decode(z[:, None, None])
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    evidence = (logits[:, 0, 0].sigmoid() * density).sum() * (z[1] - z[0])
    posterior = model(x, noise=torch.zeros(1, 1, 1, dtype=torch.float64)).posterior
    noise = torch.randn(3000, 1, 1, dtype=torch.float64)
    elbo = model(x.expand(3000, -1, -1), noise=noise).elbo.mean()
    assert elbo <= evidence.log() + 1e-6
    q, p = Gaussian(posterior.mean, (0.5 * posterior.log_variance).exp()), Gaussian(0.0, 1.0)
    drawn = posterior.sample(noise)
    weights = model.decode(drawn)[0].sigmoid() * (p.log_prob(drawn) - q.log_prob(drawn)).exp()
    assert_close("evidence", weights.mean(), evidence, 5e-2)  # 3000 draws


@pytest.mark.parametrize("prior", [None, "1 x gated-deltanet"])
@settings(max_examples=5, deadline=None)
@given(where=cuts(T))
def test_generation_in_pieces_is_generation_in_one_pass(prior: str | None, where: list[int]) -> None:
    model = build(prior=prior)
    torch.manual_seed(2)
    noise = torch.randn(2, T, 3, dtype=torch.float64)
    with torch.no_grad():
        want, end = model.generate(T, batch=2, noise=noise)
        got, state = [], None
        for part in pieces(noise, where):
            logits, state = model.generate(part.shape[1], batch=2, state=state, noise=part)
            got.append(logits)
    assert_close("logits", torch.cat(got, 1), want, 1e-12)
    assert state is not None and state.tokens == T
    assert_states_close("state", state, end, 1e-12)


def test_a_told_beginning_is_that_of_training() -> None:
    """Reading c steps and then going on gives the prior, and so what it generates, that the loss compares with; the future is not read."""
    model, x = build(prior="1 x mingru"), data("bernoulli", 2)
    noise = torch.randn(2, T, 3, dtype=torch.float64)
    with torch.no_grad():
        want, _ = model.decode(model(x, observed=5, noise=noise).prior.sample(noise))
        first, state = model.generate(5, noise=noise[:, :5], observed=x[:, :5])
        second, _ = model.generate(T - 5, state=state, noise=noise[:, 5:])
        assert_close("told", torch.cat([first, second], 1), want, 1e-12)
        changed = x.clone()
        changed[:, 5:] = 1 - changed[:, 5:]
        assert torch.equal(model(changed, observed=5, noise=noise).prior.mean, model(x, observed=5, noise=noise).prior.mean)


def test_a_state_is_saved_and_forked(tmp_path) -> None:
    model = build(prior="1 x mingru")
    noise = torch.randn(1, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        _, state = model.generate(3, noise=noise[:, :3])
        digest = state.digest()
        state.save(tmp_path / "state.safetensors")
        again = State.load(tmp_path / "state.safetensors")
        one, _ = model.generate(4, state=state, noise=noise)
        two, _ = model.generate(4, state=again, noise=noise)  # type: ignore[arg-type]
    assert torch.equal(one, two) and state.digest() == digest
    with pytest.raises(rm.errors.StateError, match="configuration"):
        build(prior="2 x mingru").generate(2, state=state)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "categorical"])
def test_padding_is_invisible_and_draws_are_data(likelihood: str) -> None:
    model, x = build(likelihood=likelihood, prior="1 x mingru"), data(likelihood)
    noise = torch.randn(3, T, 3, dtype=torch.float64)
    sizes, told = [T, 5, 8], torch.tensor([3, 2, 0])
    for side in ("left", "right"):
        span = Span.from_lengths(sizes, T, side)
        out = model(x, span, observed=told, noise=noise)
        for row in range(3):
            real = span.valid[row]  # type: ignore[index]
            alone = model(x[row : row + 1, real], observed=told[row : row + 1], noise=noise[row : row + 1, real])
            assert_close("elbo", out.elbo[row : row + 1], alone.elbo, 1e-11)
    drawn = model.draw(out.logits)
    assert drawn.shape == x.shape and drawn.dtype == x.dtype
    model(drawn, noise=noise).loss.backward()


def test_it_learns_in_seconds() -> None:
    """Two kinds of sequences, all zeros and all ones: a collapsed posterior stays at log 2 a step, and a VSSM must not."""
    torch.manual_seed(0)
    model = VSSM(channels=1, latent=2, dim=16, layers="1 x mingru", ffn=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        x = (torch.arange(16) % 2).float()[:, None, None].expand(-1, 8, 1)
        out = model(x, beta=beta_warmup(step, 100))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert out.loss < 0.5 < math.log(2) and beta_warmup(50, 100) == 0.5 and beta_warmup(7, 0) == 1.0


def test_bad_input_is_one_sentence() -> None:
    model = build()
    x = data("bernoulli")
    for problem, match in (
        (lambda: build(likelihood="poisson"), "likelihood 'poisson' is not known"),
        (lambda: build(layers="s4x"), "mixer 's4x' is not known"),
        (lambda: model(x[..., :1]), "expected \\[B, T, 2\\], T >= 1"),
        (lambda: model(x[:, :0]), "T >= 1"),
        (lambda: model(x, noise=torch.zeros(3, T, 2)), "noise has shape"),
        (lambda: model(x, observed=3), "0 without a learned prior"),
        (lambda: model(x, Span(reset=torch.zeros(3, T, dtype=torch.bool))), "span has resets"),
        (lambda: model.generate(T, observed=x), "Build it with prior=layers"),
        (lambda: build(prior="mingru").generate(3, observed=x), "observed has 12 steps and length is 3"),
        (lambda: build(likelihood="categorical")(data("categorical") + 1), "symbols 0..1"),
    ):
        with pytest.raises(rm.errors.UsageError, match=match):
            problem()
