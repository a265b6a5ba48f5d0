"""The cell zoo: torch's RNN, LSTM and GRU with everything off, the highway RNN, attention and gates from their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.mixers.deconstruct import CELLS, GATES

DIM, E = 5, 8


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("looped", [False, True])
def test_parity_torch(cell: str, looped: bool) -> None:
    """Gate off and no attention is torch's own; so is the loop whose attention writes nothing."""
    torch.manual_seed(0)
    reference = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell](DIM, E, batch_first=True)
    mixer = rm.mixer("deconstruct", dim=DIM, cell=cell, inner=E, attention=3 if looped else None)
    gates = CELLS[cell]
    with torch.no_grad():
        bias = reference.bias_ih_l0 + reference.bias_hh_l0
        if cell == "gru":  # the bias inside the reset gate stays apart
            bias[2 * E :] = reference.bias_ih_l0[2 * E :]
            mixer.inner_bias.copy_(reference.bias_hh_l0[2 * E :])
        mixer.to_gates.weight.copy_(reference.weight_ih_l0)
        mixer.to_gates.bias.copy_(bias)
        mixer.recurrent.copy_(reference.weight_hh_l0.view(gates, E, E).permute(2, 0, 1)[None])
        if looped:
            mixer.from_past.weight.zero_()
    x = torch.randn(3, 20, DIM)
    want, last = reference(x)
    y, state = mixer(x)
    assert_parity("deconstruct", f"torch.nn.{cell.upper()}", y, mixer.out(want))
    last = last if cell == "lstm" else (last,)
    for got, end in zip(state.cell, last):
        assert_parity("deconstruct", f"torch.nn.{cell.upper()}, state", got, end[0])


@pytest.mark.parametrize("depth", [1, 3])
def test_parity_highway(depth: int) -> None:
    """Depth 1: s = t tanh(.) + (1 - t) s; deeper: again, without the input."""
    torch.manual_seed(0)
    mixer = rm.mixer("deconstruct", dim=DIM, cell="rhn", inner=E, depth=depth).double()
    x, s, want = torch.randn(2, 15, DIM, dtype=torch.float64), torch.zeros(2, E, dtype=torch.float64), []
    w_h, w_t = mixer.to_gates.weight.chunk(2)
    b_h, b_t = mixer.to_gates.bias.chunk(2)
    for x_t in x.unbind(1):
        for layer in range(depth):
            a, b = (x_t @ w_h.T + b_h, x_t @ w_t.T + b_t) if layer == 0 else mixer.depth_bias[layer - 1]
            h = torch.tanh(a + s @ mixer.recurrent[layer, :, 0])
            t = torch.sigmoid(b + s @ mixer.recurrent[layer, :, 1])
            s = h * t + s * (1 - t)
        want.append(s)
    y, _ = mixer(x)
    assert_parity("deconstruct", "coupled-gate highway RNN, from the equations", y, mixer.out(torch.stack(want, 1)), 1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_attention_sees_the_last_k_states(cell: str) -> None:
    """The context by hand, from the hidden states of a run with attention, and fed to the cell as an input."""
    torch.manual_seed(0)
    k, heads = 3, 2
    mixer = rm.mixer("deconstruct", dim=DIM, cell=cell, inner=E, attention=k, heads=heads).double()
    nn.init.normal_(mixer.past.bias)
    mixer.out = nn.Identity()  # so that y is h
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    h, _ = mixer(x)
    assert mixer(x[:, :1])[1].past.shape == (1, k, 2 * E)
    held, errors = tuple(torch.zeros(1, E, dtype=torch.float64) for _ in range(2 if cell == "lstm" else 1)), []
    for t in range(9):
        context = torch.zeros(1, E, dtype=torch.float64)
        if t:
            q = mixer.past.to_q(h[0, t - 1]).view(heads, -1)
            keys, values = (part.view(-1, heads, E // heads) for part in mixer.past.to_kv(h[0, max(0, t - k) : t]).chunk(2, -1))
            score = torch.einsum("hd,jhd->hj", q, keys) / (E // heads) ** 0.5 + mixer.past.bias[:, k - len(keys) :]
            context = torch.einsum("hj,jhd->hd", score.softmax(-1), values).reshape(1, E)
        a = mixer.to_gates(x[:, t]) + mixer.from_past(context)
        held = mixer.cell_step(a.unflatten(-1, (-1, E)), held, mixer.recurrent)
        errors.append(assert_close(f"{cell} {t}", h[:, t], held[0], 1e-12))
    assert len(errors) == 9


def test_gates() -> None:
    torch.manual_seed(0)
    x, h = torch.randn(2, 4, DIM), torch.randn(2, 4, E)
    for gate in GATES:
        mixer = rm.mixer("deconstruct", dim=DIM, cell="rnn", inner=E, gate=gate)
        u = mixer.to_skip(x)
        if gate == "input":
            g = mixer.to_residual_gate(x).sigmoid()
            want = g * h + (1 - g) * u
        else:
            want = u + (h if gate == "additive" else 0.01 * h)
        assert_close(gate, mixer.residual(x, h), want, 1e-6)
    assert rm.mixer("deconstruct", dim=DIM, cell="rnn", inner=E).residual(x, h) is h


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("gate, attention", [(None, None), ("rate", None), ("additive", 4)])
def test_every_combination_streams(cell: str, gate: str | None, attention: int | None) -> None:
    """Pieces, resets and padding for the settings that the laws' example leaves out."""
    torch.manual_seed(0)
    mixer = rm.mixer("deconstruct", dim=8, cell=cell, gate=gate, attention=attention).double()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    reset, valid = torch.zeros(2, 20, dtype=torch.bool), torch.ones(2, 20, dtype=torch.bool)
    reset[0, 7], reset[1, [3, 4]], valid[1, 15:], valid[0, 5] = True, True, False, False
    y, state = mixer(x, span=rm.Span(valid, reset))
    first, held = mixer(x[:, :6], span=rm.Span(valid[:, :6], reset[:, :6]))
    rest, last = mixer(x[:, 6:], held, rm.Span(valid[:, 6:], reset[:, 6:]))
    assert_close("pieces", torch.cat([first, rest], 1), y, 1e-12)
    alone, end = mixer(x[:1, 7:])
    assert_close("document", y[:1, 7:], alone, 1e-12)
    for part, other, want in zip(last.cell, state.cell, end.cell):
        assert_close("state", part, other, 1e-12)
        assert_close("state of the document", part[:1], want, 1e-12)


def test_forms_of_the_cells_of_ops() -> None:
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    for cell in ("rnn", "lstm", "gru"):
        fast = rm.mixer("deconstruct", dim=8, cell=cell).double()
        slow = rm.mixer("deconstruct", dim=8, cell=cell, backend="naive").double()
        slow.load_state_dict(fast.state_dict())
        assert_close(cell, fast(x)[0], slow(x)[0], 1e-12)


WRONG = [
    ({"cell": "lstn"}, "cell 'lstn' is not known; did you mean lstm"),
    ({"gate": "inputs"}, "gate 'inputs' is not known; did you mean input"),
    ({"cell": "gru", "depth": 2}, "depth is 2; only an rhn"),
    ({"attention": 4, "heads": 3}, "heads=3 does not divide inner=8"),
    ({"attention": 0}, "attention is 0"),
]


@pytest.mark.parametrize("hyper, message", WRONG)
def test_wrong_use(hyper: dict, message: str) -> None:
    with pytest.raises(rm.errors.UsageError, match=message):
        rm.mixer("deconstruct", dim=8, **hyper)
