"""The shared pieces: each gate is its equation, slots never see each other, and weaving is undone by splitting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import assert_close
from remanence import Decoder, ModelConfig
from remanence.errors import UsageError
from remanence.memory.base import Piece
from remanence.memory.parts import (
    BiasedNorm,
    BiasGate,
    ConvexGate,
    CrossAttention,
    GRUGate,
    LowRank,
    LSTMGate,
    ResidualGate,
    SlotAttention,
    Weave,
    hold,
    packed,
    run_layers,
)
from segment_memories import cross_attention, slot_attention

B, M, D = 2, 3, 8


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, M, D, generator=random, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def test_the_gru_is_that_of_torch(pair) -> None:
    gate, cell = GRUGate(D).double(), nn.GRUCell(D, D).double()
    with torch.no_grad():
        for linear, weight, bias in ((gate.to_new, cell.weight_ih, cell.bias_ih), (gate.to_old, cell.weight_hh, cell.bias_hh)):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        old, new = pair
        assert_close("GRU", gate(old, new), cell(new.flatten(0, 1), old.flatten(0, 1)).view(B, M, D), 1e-12)


def test_gates_at_their_limits(pair) -> None:
    old, new = pair
    bias, lstm, convex = BiasGate(D).double(), LSTMGate(D, -1.0, 1.0).double(), ConvexGate(D).double()
    with torch.no_grad():
        bias.bias.fill_(100.0)
        assert_close("bias gate open", bias(old, new), old, 1e-12)
        bias.bias.fill_(-100.0)
        assert_close("bias gate shut", bias(old, new), new, 1e-12)
        i, f = ((new @ linear.weight.T + linear.bias).sigmoid() for linear in (lstm.to_input, lstm.to_forget))
        assert_close("LSTM gates", lstm(old, new), f * old + i * new, 1e-12)
        assert lstm.to_input.bias.eq(-1).all() and lstm.to_forget.bias.eq(1).all()
        convex.outer.bias.fill_(-100.0)
        assert_close("convex gate shut", convex(old, new), old, 1e-12)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("kind", ["none", "static", "elementwise", "linear"])
def test_parity_residual_gates(pair, kind: str, activation: str) -> None:
    """rxlm's gate, slot by slot; at its first values tanh gives the sum and sigmoid the mean."""
    old, new = pair
    gate = ResidualGate(M, kind, activation).double()
    if kind in ("static", "elementwise"):
        first = gate(old, new)
        assert_close("at first", first, new + old if activation == "tanh" else (new + old) / 2, 1e-12)
        nn.init.normal_(gate.gate)
    status = (new + old).sum(-1) / D  # [B, M]
    for b in range(B):
        for slot in range(M):
            if kind == "none":
                want = new[b, slot] + old[b, slot]
            else:
                if kind == "linear":
                    logit = gate.gate.weight[slot] @ status[b] + gate.gate.bias[slot]
                else:
                    logit = gate.gate[slot] * (status[b, slot] if kind == "elementwise" else 1)
                g = torch.tanh(logit) if activation == "tanh" else torch.sigmoid(logit)
                want = (1 + g if activation == "tanh" else g) * new[b, slot] + (1 - g) * old[b, slot]
            assert_close("slot", gate(old, new)[b, slot], want, 1e-12)


def test_biased_norm_keeps_slots_on_the_sphere(pair) -> None:
    norm = BiasedNorm(M, D).double()
    with torch.no_grad():
        for x in (norm.initial, norm(*pair)):
            assert_close("length", x.norm(dim=-1), torch.ones(x.shape[:-1], dtype=torch.float64), 1e-12)
        state = pair[0]
        for _ in range(200):  # with nothing written it forgets: it ends at v / |v|, wherever it starts
            state = norm(state, state)
        assert_close("what is left", state, norm.initial.expand_as(state), 1e-3)


def test_attention_is_the_masked_attention(pair) -> None:
    slots, x = pair[0], torch.randn(B, 5, D, dtype=torch.float64)
    cross, own = CrossAttention(D, 2, silent=False).double(), SlotAttention(D, 2, 0.5).double()
    assert_close("cross", cross(x, slots), cross_attention(cross, x, slots), 1e-12)
    assert_close("slots", own(slots, x), slot_attention(own, slots, x), 1e-12)
    changed = slots.clone()
    changed[:, 1] += 1
    assert torch.equal(own(changed, x)[:, [0, 2]], own(slots, x)[:, [0, 2]])  # a slot sees no other slot
    assert not CrossAttention(D, 2)(x.float(), slots.float()).any()  # silent at first


def test_weaving_is_undone() -> None:
    a, b, c = torch.randn(3, 2, 4), torch.randn(3, 3, 4), torch.randn(3, 1, 4)
    rows, some = torch.tensor([True, False, True]), torch.tensor([[True, True, False], [False] * 3, [True] * 3])
    weave = Weave([(a, rows), (b, some), (c, True)], first=torch.tensor([False, True, True]))
    assert weave.x.shape == (3, 6, 4) and weave.span.lengths().tolist() == [5, 1, 6]
    assert torch.equal(weave.x[0, :5], torch.cat([a[0], b[0, :2], c[0]])) and torch.equal(weave.x[1, :1], c[1])
    assert weave.span.reset[:, 0].tolist() == [False, True, True] and not weave.span.reset[:, 1:].any()
    got = weave.split(weave.x)
    for part, whole, real in zip(got, (a, b, c), (rows[:, None].expand(3, 2), some, torch.ones(3, 1, dtype=torch.bool))):
        assert torch.equal(part, whole * real[..., None])
    plain = Weave([(a, True), (b, False), (c, True)])
    assert plain.span is None and [part.shape[1] for part in plain.split(plain.x)] == [2, 0, 1]


def test_held_vectors_are_the_segment() -> None:
    """Rows at different phases: where a segment ends, what is held is its vectors in order."""
    x, open = torch.randn(2, 9, 3), None
    row0, row1 = [], []
    for start, sizes in ((0, (3, 1)), (3, (1, 3)), (6, (0, 2))):  # row 0 ends its segment of 4 in the second round, row 1 too
        n = max(sizes)
        piece = Piece(torch.tensor([False] * 2), torch.tensor([False] * 2), torch.arange(n) < torch.tensor(sizes)[:, None])
        kept = hold(open, [x[:, start : start + n]], piece, 4)
        row0 += list(x[0, start : start + sizes[0]])
        row1 += list(x[1, start : start + sizes[1]])
        open = type("Open", (), {"kept": kept})()
        if start == 3:
            assert torch.equal(kept[0][0], torch.stack(row0)) and torch.equal(kept[0][1], torch.stack(row1))
    assert torch.equal(open.kept[0][1], torch.stack(row1)[-4:]) and torch.equal(open.kept[0][0], torch.stack(row0))


def test_packed_moves_what_lives_to_the_right() -> None:
    alive = torch.tensor([[True, False, True, False], [False, False, False, True]])
    x = torch.arange(8.0).view(2, 4)
    left, y = packed(alive, x)
    assert left.tolist() == [[True, True], [False, True]] and y[0].tolist() == [0, 2] and y[1, 1] == 7


def test_low_rank_starts_as_nothing_and_is_the_merged_weight() -> None:
    backbone = Decoder(ModelConfig(vocab=7, dim=8, layers="attention, gated-deltanet", ffn=1)).double()
    lora, x = LowRank(backbone, 2, 4.0), torch.randn(1, 5, 8, dtype=torch.float64)
    nothing = [None] * 2
    plain, _ = run_layers(list(backbone.blocks), x, nothing, nothing)
    assert_close("at first", run_layers(list(lora.layers(backbone)), x, nothing, nothing)[0], plain, 1e-12)
    with torch.no_grad():
        for b in lora.b:
            b.normal_()
        got, _ = run_layers(list(lora.layers(backbone)), x, nothing, nothing)
        for (index, name), a, b in zip(lora.names, lora.a, lora.b):
            backbone.blocks[index].get_parameter(name).add_(2.0 * (b @ a))
        assert_close("merged", got, run_layers(list(backbone.blocks), x, nothing, nothing)[0], 1e-12)
        assert not torch.allclose(got, plain)


def test_bad_arguments() -> None:
    for make, message in (
        (lambda: ResidualGate(2, "dynamic"), "gate is 'dynamic'"),
        (lambda: ResidualGate(2, "static", "relu"), "gate_activation is 'relu'"),
        (lambda: SlotAttention(8, 2, 0.0), "tau is 0.0"),
        (lambda: SlotAttention(8, 3), "heads=3 does not divide dim=8"),
        (lambda: CrossAttention(8, 0), "heads is 0"),
    ):
        with pytest.raises(UsageError, match=message):
            make()
