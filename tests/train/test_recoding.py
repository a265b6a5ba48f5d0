"""Activation recoding: nothing at alpha = 0, the paper's step worked out by hand for an LSTM, and any cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close, assert_states_close, cuts, pieces
from parity import assert_parity
from remanence import Decoder, ModelConfig
from remanence.errors import ShapeError, UsageError
from remanence.train.recoding import SIGNALS, Recoding

from hypothesis import given, settings  # isort: skip


def small(layers: str = "2 x flashrnn", **options) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab=13, dim=16, layers=layers, ffn=1, **options)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def ids(batch: int = 2, length: int = 15) -> torch.Tensor:
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(
    ("layers", "of"),
    [("2 x flashrnn", "after"), ("2 x flashrnn", "before"), ("gated-deltanet, mingru", "before"), ("slstm, pararnn", "after")],
)
def test_parity_alpha_0_is_the_model(layers: str, of: str, signal: str) -> None:
    model = small(layers)
    got = Recoding(model, 0.0, signal, of).eval()(ids())
    assert_parity("recoding", f"the model itself at alpha = 0 ({layers}, {signal})", got.logits, model(ids()).logits)
    assert not got.logits.requires_grad


@pytest.mark.parametrize("signal", SIGNALS)
def test_parity_the_step_by_hand(signal: str) -> None:
    """One LSTM without norms in the way: h, c <- h, c - alpha grad d, d computed from the output that h gives."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab=13, dim=8, layers=[{"mixer": "flashrnn", "heads": 1}], ffn=0)).double().eval()
    mixer, block = model.blocks[0].mixer, model.blocks[0]
    tokens, alpha = ids(1, 10), 0.7
    h = c = torch.zeros(1, 8, dtype=torch.float64)
    want = []
    for t, token in enumerate(tokens[0]):
        x = model.embedding(token[None])
        a = mixer.to_gates(block.norm(x)) + h @ mixer.recurrent[0].flatten(1)
        i, f, z, o = a.chunk(4, -1)
        c = (f.sigmoid() * c + i.sigmoid() * z.tanh()).detach().requires_grad_()
        h = o.sigmoid().detach() * c.tanh()  # c moves the output through h; o was computed before
        log_p = model.head(model.norm(x + mixer.out(h))).log_softmax(-1)
        want.append(log_p.detach())
        if t + 1 < tokens.shape[1]:
            d = -log_p[0, tokens[0, t + 1]] if signal == "surprisal" else -(log_p.exp() * log_p).sum()
            steps = torch.autograd.grad(d, (h, c))
            h, c = ((state - alpha * step).detach() for state, step in zip((h, c), steps))
    got = Recoding(model, alpha, signal).eval()(tokens)
    assert_parity("recoding", f"the step by hand on an LSTM ({signal})", got.logits.log_softmax(-1), torch.stack(want, 1))
    plain = model(tokens).logits
    assert_close("the first token is not recoded", got.logits[:, :1], plain[:, :1], 1e-12)
    assert not torch.allclose(got.logits[:, 1:], plain[:, 1:])


@pytest.mark.parametrize(("signal", "of", "layers"), [("surprisal", "after", "flashrnn"), ("entropy", "before", "gated-deltanet")])
@settings(max_examples=5)
@given(where=cuts(15))
def test_any_cut(signal: str, of: str, layers: str, where: list[int]) -> None:
    recoding = Recoding(small(layers), 0.5, signal, of).eval()
    with torch.no_grad():
        whole = recoding(ids())
        state, parts = None, []
        for part in pieces(ids(), where):
            out = recoding(part, state)
            state = out.state
            parts.append(out.logits)
    assert_close("logits", torch.cat(parts, 1), whole.logits, 1e-9)
    assert_states_close("state", state, whole.state, 1e-9)
    assert state.tokens == 15 and not any(tensor.requires_grad for tensor in state.tensors())


def test_a_small_step_lowers_the_entropy() -> None:
    """The signal is what the step descends: the entropy read from the recoded state, right after it, is lower."""
    model = small("flashrnn")
    recoding = Recoding(model, 1e-3, "entropy").eval()
    out = model(ids(4, 1))
    recoded = recoding._recode(out, ids(4, 1)[:, 0])
    block, x = model.blocks[0], model.embedding(ids(4, 1))

    def entropy(state: rm.State) -> float:
        h = x + block.mixer.out(state.layers[0].cell[0].flatten(1)[:, None])
        log_p = model.head(model.norm(h + block.ffn(block.ffn_norm(h)))).log_softmax(-1)
        return -(log_p.exp() * log_p).sum().item()

    assert entropy(recoded) < entropy(out.state)


def test_the_state_before_takes_the_step() -> None:
    """The surprisal of the token that came is lower when the one before it is read again from the recoded state."""
    model, tokens = small("gated-deltanet"), ids(2, 6)
    before = model(tokens[:, :4]).state.detach()
    recoding = Recoding(model, 1e-3, of="before").eval()

    def surprisal(state: rm.State) -> float:
        return F.cross_entropy(model(tokens[:, 4:5], state).logits[:, 0], tokens[:, 5]).item()

    leaf = before.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
    stepped = recoding._step(leaf, model(tokens[:, 4:5], leaf), tokens[:, 5], "")
    assert surprisal(stepped) < surprisal(before)
    want = model(tokens[:, 4:5], stepped).state
    assert_states_close("recoded", recoding._recode_before(tokens[:, 4], before, tokens[:, 5]), want, 1e-12)


@pytest.mark.parametrize("of", ["after", "before"])
def test_training_reaches_the_weights_and_alpha(of: str) -> None:
    recoding = Recoding(small(), 0.1, of=of, learn=True).train()
    out = recoding(ids())
    F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    assert recoding.alpha.grad is not None and float(recoding.alpha.grad) != 0
    assert all(weight.grad is not None for weight in recoding.model.parameters())


def test_what_cannot_be_recoded_is_refused() -> None:
    with pytest.raises(UsageError, match="signal 'suprisal' is not known; did you mean surprisal"):
        Recoding(small(), signal="suprisal")
    with pytest.raises(ShapeError, match="expected .B, T. with T >= 1"):
        Recoding(small())(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(UsageError, match="no parameter of the model requires gradients"):
        Recoding(small().requires_grad_(False))(ids())
    with pytest.raises(UsageError, match="not computed from the state that it returns; use of='before'"):
        Recoding(small("gated-deltanet"))(ids())
    assert rm.find("recoding").builder is Recoding
