"""ProSG: rows have weights of their own, eta = 0 is the decoder, and a prompt's state goes where it should."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_states_close, pieces
from parity import assert_parity
from remanence import Decoder, ModelConfig, Span, State
from remanence.errors import ShapeError, StateError, UnknownName, UsageError
from remanence.memory.prosg import ProSG, ProSGState, features, prompt_loss
from remanence.train import Piece, TrainConfig, train

MIXERS = ("rwkv4", "gated-deltanet", "gateloop", "minlstm")


def backbone(mixer: str = "rwkv4", dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig(vocab=20, dim=16, layers=[{"mixer": mixer, "times": 2}], ffn=1)).to(dtype).eval()


@functools.cache
def _weights(mixer: str, dtype: torch.dtype, hyper: tuple) -> ProSG:
    model = ProSG(backbone(mixer, dtype), **{"eta": 0.5, "rank": 2} | dict(hyper)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def prosg(mixer: str = "rwkv4", dtype: torch.dtype = torch.float32, **hyper) -> ProSG:
    return copy.deepcopy(_weights(mixer, dtype, tuple(hyper.items())))


def ids(length: int = 30, seed: int = 1) -> Tensor:
    return torch.randint(20, (2, length), generator=torch.Generator().manual_seed(seed))


def absorbed(model: ProSG, prompt: Tensor) -> ProSGState:
    return model.absorb(model(prompt, logits="none").state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_parity_with_weights_of_its_own_for_every_row(mixer: str) -> None:
    model = prosg(mixer, torch.float64, targets=("ffn.up", "mixer.out"))
    state = absorbed(model, ids(9))
    got = model(ids(), state).logits
    rows = []
    for row in range(2):
        one = copy.deepcopy(model.backbone)
        targets = [linear for block in one.blocks for linear in model._targets(block)]
        assert len(targets) == 4
        with torch.no_grad():
            for linear, a, b in zip(targets, state.factors[::2], state.factors[1::2]):
                assert_close("norm of a", a[row].norm(dim=1), torch.ones(2, dtype=torch.float64), 1e-3)
                linear.weight += 0.5 * b[row].T @ a[row]
        rows.append(one(ids()[row : row + 1], state.base.rows([row]).stamp(*one.header)).logits)
    assert_parity("prosg", "the decoder with W + eta b a^T, row by row", got, torch.cat(rows))


def test_parity_of_eta_0_with_the_decoder() -> None:
    model = prosg(eta=0.0)
    base = model.backbone(ids(9), logits="none").state
    assert_parity("prosg", "the decoder (eta=0)", model(ids(), absorbed(model, ids(9))).logits, model.backbone(ids(), base).logits)
    fresh = ProSG(backbone())  # b is zero at the start of training
    assert torch.equal(fresh(ids(), absorbed(fresh, ids(9))).logits, fresh.backbone(ids(), base := fresh.backbone(ids(9)).state).logits)
    assert base.tokens == 9
    model = prosg()
    assert torch.equal(model(ids()).logits, model.backbone(ids()).logits)  # before any prompt
    assert not torch.allclose(model(ids(), absorbed(model, ids(9))).logits, model.backbone(ids(), base).logits, rtol=1e-3)


@pytest.mark.parametrize("mixer", MIXERS)
def test_any_cut_rows_padding_and_resets(mixer: str, tmp_path) -> None:
    model, x = prosg(mixer), ids()
    state = absorbed(model, ids(9))
    whole = model(x, state)
    end, outputs = state, []
    for part in pieces(x, [1, 2, 17]):
        out = model(part, end)
        end, outputs = out.state, [*outputs, out.logits]
    assert_close("any cut", torch.cat(outputs, 1), whole.logits, 1e-5)
    assert_states_close("any cut", end, whole.state, 1e-5)
    assert_close("rows", model(x[1:], state.rows([1])).logits, whole.logits[1:], 1e-5)
    state.save(tmp_path / "state")
    assert torch.equal(model(x, State.load(tmp_path / "state")).logits, whole.logits)

    left = Span.from_lengths([20, 30], 30, side="left")
    assert_close("padding", model(x, state, left).logits[0, 10:], model(x[:1, 10:], state.rows([0])).logits[0], 1e-5)
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[0, 12] = reset[1, 29] = True
    out = model(x, state, Span(reset=reset))
    assert_close("before a reset", out.logits[0, :12], whole.logits[0, :12], 1e-5)
    assert_close("after it", out.logits[0, 12:], model(x[:1, 12:]).logits[0], 1e-5)
    assert not any(bool(factor.any()) for factor in out.state.factors) and out.state.seen.tolist() == [18, 1]


def test_absorbing_again_replaces_and_an_empty_row_keeps_nothing() -> None:
    model = prosg()
    state = absorbed(model, ids(9))
    later = model(ids(5, 2), state).state
    assert all(torch.equal(a, b) for a, b in zip(later.factors, state.factors))
    again = model.absorb(later)
    assert not torch.allclose(again.factors[1], state.factors[1])
    span = Span.from_lengths([0, 9], 9)
    state = model.absorb(model(ids(9), span=span).state)
    assert not bool(state.factors[1][0].any()) and bool(state.factors[1][1].any())
    assert bool(torch.isfinite(torch.cat([factor.flatten() for factor in state.factors])).all())


def test_gradients_reach_the_nets_alone_through_the_prompt() -> None:
    model, x = prosg(), ids()
    model(x, absorbed(model, ids(9)), targets=x.roll(-1, 1)).loss.backward()
    assert all(weight.grad is None for weight in model.backbone.parameters())
    assert all(bool(weight.grad.any()) for weight in model.mappers.parameters())
    model = ProSG(backbone(), train_base=True)
    model(x, absorbed(model, ids(9)), targets=x.roll(-1, 1)).loss.backward()
    assert all(weight.grad is not None for weight in model.backbone.parameters())
    assert [bool(linear.weight.grad.any()) for linear in model.mappers[0].outer] == [False, True, False, True]  # b first, then a


def test_it_learns_to_keep_a_field_of_the_prompt(tmp_path) -> None:
    """A frozen random decoder; only the nets learn to say after a filler which of two symbols the prompt held."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(vocab=20, dim=16, layers=[{"mixer": "rwkv4", "times": 2}], ffn=1, tie=False, embedding_std=1.0)
    model = ProSG(Decoder(config), rank=2, eta=1.0, hidden=32)
    torch.nn.init.normal_(model.backbone.unembedding.weight)

    class Data:
        carries = False

        def batch(self, seed: int, index: int) -> list[Piece]:
            random = torch.Generator().manual_seed(index)
            prompt = torch.randint(4, 20, (32, 4), generator=random)
            prompt[:, 1] = field = torch.randint(0, 2, (32,), generator=random)
            ids = torch.randint(4, 20, (32, 8), generator=random)
            targets = torch.full((32, 8), -100)
            targets[:, -1] = field
            return [Piece(prompt), Piece(ids, targets)]

    @torch.no_grad()
    def loss_of(index: int) -> float:
        prompt, answer = Data().batch(0, index)
        return float(prompt_loss(model, answer, prompt_loss(model, prompt, None)[1])[0]) / 32

    before = loss_of(1000)
    train(model, Data(), TrainConfig(steps=120, lr=1e-2, checkpoint_every=0, device="cpu"), tmp_path, loss=prompt_loss, quiet=True)
    assert loss_of(1000) < 0.5 < 0.69 < before
    again = rm.load(tmp_path / "last")
    assert isinstance(again, ProSG) and again.config == model.config
    assert torch.equal(again(ids(), absorbed(again, ids(9))).logits, model.eval()(ids(), absorbed(model, ids(9))).logits)


def test_features() -> None:
    class ProSGTestState(State):
        seen: Tensor
        sums: Tensor
        turns: Tensor

    state = ProSGTestState(seen=torch.tensor([3]), sums=torch.tensor([[-1e30, 1.0]]), turns=torch.tensor([[1j]]))
    assert_close("features", features(state), torch.tensor([[-69.0776, 0.6931, 0.0, 0.6931]]), 1e-5)


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="layer 1's state grows"):
        ProSG(Decoder(ModelConfig(vocab=20, dim=16)))
    with pytest.raises(UnknownName, match="'ffn.ups' is not known; did you mean ffn.up"):
        ProSG(backbone(), targets=("ffn.ups",))
    with pytest.raises(UsageError, match="rank is 0"):
        ProSG(backbone(), rank=0)
    with pytest.raises(UsageError, match="a Decoder"):
        ProSG(prosg())
    model = prosg()
    with pytest.raises(UsageError, match="that this prosg returned"):
        model.absorb(model.backbone(ids()).state)
    with pytest.raises(StateError):
        model(ids(), prosg(rank=3)(ids()).state)
    with pytest.raises(ShapeError, match="empty"):
        model(torch.zeros(1, 0, dtype=torch.long))
