import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import remanence as rm
from remanence.state import Growing, State
from remanence.train import Piece, TrainConfig, replay
from remanence.train.loop import accumulate_gradients, token_loss


class ToyState(State):
    seen: Tensor  # [B] int64
    memory: Tensor  # [B, m, d]
    cache: Growing  # [B, n, d]


class Toy(nn.Module):
    """An RMT in small: the outputs at the memory tokens are the next segment's memory; dropout inside; and a cache that grows."""

    def __init__(self, dim=6, tokens=2, drop=0.3):
        super().__init__()
        self.first = nn.Parameter(torch.randn(tokens, dim))
        self.mix, self.out, self.drop = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Dropout(drop)

    def forward(self, x: Tensor, state: ToyState | None) -> tuple[Tensor, ToyState]:
        memory = state.memory if state else self.first.expand(len(x), -1, -1)
        z = torch.cat([memory, x], 1)
        past = state.cache if state else Growing(x[:, :0])
        cache = past.append(self.drop(x))
        keys = torch.cat([memory, cache.tensor], 1)
        z = z + self.drop(torch.tanh(self.mix(z))) + torch.softmax(z @ keys.mT, -1) @ keys
        seen = (state.seen if state else torch.zeros(len(x), dtype=torch.long)) + x.shape[1]
        y = self.out(torch.nn.functional.normalize(z, dim=-1))
        tokens = self.first.shape[0]
        return y[:, tokens:], ToyState(seen=seen, memory=y[:, :tokens], cache=cache)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm().clamp(min=1e-30)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("only_last", [False, True])
def test_toy_with_dropout_equals_full_bptt(only_last):
    torch.manual_seed(0)
    model = Toy().double()
    pieces = list(enumerate(torch.randn(5, 3, 4, 6, dtype=torch.float64)))

    def step(item, state):
        index, x = item
        y, state = model(x, state)
        return (None if only_last and index < 4 else y.square().mean() + y.mean()), state

    torch.manual_seed(1)
    state, losses = None, []
    for item in pieces:
        loss, state = step(item, state)
        losses += [] if loss is None else [loss]
    sum(losses).backward()
    full, after = gradients(model), torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(1)
    total, final = replay(step, pieces)
    assert worst(gradients(model), full) < 1e-12
    assert float(full[0].norm()) > 1e-5  # the learnt first memory: the gradient did travel through every piece
    assert abs(float(total - sum(losses).detach())) < 1e-12 and not total.requires_grad
    assert torch.equal(torch.get_rng_state(), after)  # as one forward pass leaves it
    assert all(torch.allclose(a, b) and not a.requires_grad for a, b in zip(final.tensors(), state.tensors()))


def decoder(layers, seed=0, **hyper):
    torch.manual_seed(seed)
    return rm.Decoder(rm.ModelConfig(vocab=13, dim=16, layers=layers, **hyper)).double()


def some_pieces(count, batch=2, length=5, seed=0):
    ids = torch.randint(13, (batch, count * length + 1), generator=torch.Generator().manual_seed(seed))
    return [Piece(ids[:, i : i + length], ids[:, i + 1 : i + length + 1]) for i in range(0, count * length, length)]


LAYERS = [{"mixer": "gated-deltanet", "heads": 2}, {"mixer": "attention", "heads": 2}, {"mixer": "attention", "heads": 2, "window": 7}]


@pytest.mark.parametrize("k2", [-1, 2, 0])
@pytest.mark.parametrize("how", ["replay", "recompute"])
def test_decoder_equals_full_bptt(how, k2):
    model, pieces = decoder(LAYERS), some_pieces(7)
    other = copy.deepcopy(model)
    start = model(torch.randint(13, (2, 3))).state.detach()
    count = sum(p.count for p in pieces)
    value, state, _ = accumulate_gradients(model, pieces, start, TrainConfig(k2=k2), token_loss, count)
    again, final, _ = accumulate_gradients(other, pieces, start, TrainConfig(k2=k2, **{how: True}), token_loss, count)
    assert worst(gradients(other), gradients(model)) < 1e-12 and abs(value - again) < 1e-12
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(state.tensors(), final.tensors(), strict=True))


def test_pieces_equal_the_whole_and_k2_truncates():
    model, pieces = decoder(LAYERS[:1]), some_pieces(6)
    whole = Piece(torch.cat([p.ids for p in pieces], 1), torch.cat([p.targets for p in pieces], 1))
    found = {}
    for name, batch, k2 in (("whole", [whole], -1), ("pieces", pieces, -1), ("k2=5", pieces, 5), ("k2=1", pieces, 1)):
        model.zero_grad()
        accumulate_gradients(model, batch, None, TrainConfig(k2=k2, replay=True), token_loss, whole.count)
        found[name] = gradients(model)
    assert worst(found["pieces"], found["whole"]) < 1e-12
    assert worst(found["k2=5"], found["whole"]) < 1e-12  # six pieces have five boundaries
    assert worst(found["k2=1"], found["whole"]) > 1e-4


class LiveBytes:
    """The largest number of bytes that autograd held at once."""

    class Box:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Box:
        box, size = LiveBytes.Box(tensor), tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(box, self.free, size)
        return box

    def free(self, size: int) -> None:
        self.now -= size


def peak(model, pieces, **options) -> int:
    live = LiveBytes()
    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda box: box.tensor):
        accumulate_gradients(model, pieces, None, TrainConfig(**options), token_loss, sum(p.count for p in pieces))
    return live.peak


def test_memory_does_not_grow_with_the_pieces():
    model = decoder(LAYERS[:1])
    few, many = some_pieces(3, length=16), some_pieces(24, length=16)
    assert peak(model, many, replay=True) <= 1.02 * peak(model, few, replay=True)
    assert peak(model, many) > 6 * peak(model, few)  # what it would be without
    assert peak(model, many) > 15 * peak(model, many, replay=True)


def test_no_pieces():
    with pytest.raises(rm.errors.UsageError, match="no pieces"):
        replay(lambda piece, state: (None, state), [])
