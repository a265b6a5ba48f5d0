"""minGRU and minLSTM: against the papers' loop, the public package, and themselves cut anywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import remanence as rm
from helpers import assert_close, assert_gradients_close, cuts, pieces
from remanence import Span

TOL = 1e-5


def loop(mixer, x, form, hidden=None):
    """The equations, token by token, in x's dtype."""

    def g(u):
        return torch.where(u >= 0, u + 0.5, u.sigmoid()) if form == "log" else u

    outputs = []
    for token in x.unbind(1):
        if mixer.slug == "mingru":
            u, k = mixer.to_hidden_gates(token).chunk(2, -1)
            keep, write = 1 - k.sigmoid(), k.sigmoid()
        else:
            u, f, i = mixer.to_hidden_gates(token).chunk(3, -1)
            f, i = f.sigmoid(), i.sigmoid()
            keep, write = f / (f + i), i / (f + i)
        hidden = write * g(u) if hidden is None else keep * hidden + write * g(u)
        outputs.append(mixer.out(hidden))
    return torch.stack(outputs, 1), hidden


@pytest.mark.parametrize("form", ["log", "vanilla"])
@pytest.mark.parametrize("expansion", [1.0, 2.0])
@pytest.mark.parametrize("slug", ["mingru", "minlstm"])
def test_equals_the_loop(slug, expansion, form):
    mixer = rm.mixer(slug, dim=12, expansion=expansion, form=form).double()
    x = 3 * torch.randn(2, 70, 12, dtype=torch.float64)
    y, state = mixer(x)
    want, hidden = loop(mixer, x, form)
    assert_close("y", y, want, 1e-12)
    assert_close("hidden", state.hidden, hidden, 1e-12)
    weights = dict(mixer.named_parameters())
    got, ref = (dict(zip(weights, torch.autograd.grad(out.sin().sum(), list(weights.values())))) for out in (y, want))
    assert_gradients_close(slug, got, ref, 1e-12)


@pytest.mark.parametrize("expansion", [1.0, 1.5])
@pytest.mark.parametrize("slug", ["mingru", "minlstm"])
def test_equals_the_public_package(slug, expansion):
    kind = {"mingru": "minGRU", "minlstm": "minLSTM"}[slug]
    package = pytest.importorskip(f"minGRU_pytorch.{kind}", reason="the package minGRU-pytorch is not installed")
    theirs = getattr(package, kind)(16, expansion_factor=expansion)
    ours = rm.mixer(slug, dim=16, expansion=expansion)
    weights = dict(zip(dict(ours.named_parameters()), theirs.parameters()))  # both: first the joint projection, then the output's
    ours.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    x, direction = torch.randn(2, 100, 16), torch.randn(2, 100, 16)
    assert_close("y in float32", ours(x)[0], theirs(x), TOL)
    # the rest in float64: the package's own scan loses 1e-5 of the gradient in float32
    ours, theirs, x = ours.double(), theirs.double(), x.double()
    (y, state), (want, hidden) = ours(x), theirs(x, return_next_prev_hidden=True)
    assert_close("y", y, want, TOL)
    assert_close("hidden", state.hidden, hidden[:, 0], TOL)
    got = dict(zip(weights, torch.autograd.grad((y * direction).sum(), list(ours.parameters()))))
    ref = dict(zip(weights, torch.autograd.grad((want * direction).sum(), list(weights.values()))))
    assert_gradients_close(slug, got, ref, TOL)
    if slug == "mingru":  # the package's minLSTM sends the carried state through g, so only its fresh start can be compared
        more = torch.randn(2, 9, 16, dtype=torch.float64)
        assert_close("continued", ours(more, state)[0], theirs(more, hidden), TOL)


@pytest.mark.parametrize("slug", ["mingru", "minlstm"])
@given(where=cuts(90), resets=st.lists(st.integers(0, 89), max_size=3))
def test_any_cut(slug, where, resets):
    mixer = rm.mixer(slug, dim=8)
    x, reset = torch.randn(2, 90, 8), torch.zeros(2, 90, dtype=torch.bool)
    reset[1, resets] = True
    whole, end = mixer(x, span=Span(reset=reset))
    state, outputs = None, []
    for part, marks in zip(pieces(x, where), pieces(reset, where)):
        y, state = mixer(part, state, Span(reset=marks))
        outputs.append(y)
    assert_close("y", torch.cat(outputs, 1), whole, TOL)
    assert_close("hidden", state.hidden, end.hidden, TOL)
    assert torch.equal(state.seen, end.seen)


def test_the_log_form_is_positive_and_the_state_small():
    y, state = rm.mixer("mingru-minlstm", dim=8, expansion=1.0)(torch.randn(1, 50, 8))
    assert bool((y > 0).all()) and state.hidden.shape == (1, 8) and state.tokens == 50


@pytest.mark.parametrize("slug", ["mingru", "minlstm"])
@pytest.mark.parametrize(("wrong", "says"), [({"form": "exp"}, "form is 'exp'"), ({"expansion": 0.0}, "expansion is 0.0")])
def test_wrong_hyper_parameters_are_refused(slug, wrong, says):
    with pytest.raises(rm.errors.UsageError, match=says):
        rm.mixer(slug, dim=8, **wrong)
