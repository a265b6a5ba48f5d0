"""Prefix linear attention: the released code's quadratic form, the two phases, the loss, and JRT-Prompt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import remanence as rm
from helpers import assert_close, assert_states_close
from parity import assert_parity
from remanence import Span
from remanence.mixers.based import taylor
from remanence.mixers.jrt import jrt_loss, jrt_prompt, prefix

M, T = 37, 90


def small(**hyper: int) -> rm.Mixer:
    torch.manual_seed(0)
    return rm.mixer("jrt", dim=24, heads=2, feature_dim=4, **hyper).double()


def two_phases(mixer: rm.Mixer, x: torch.Tensor, where: list[int]) -> torch.Tensor:
    y, state = mixer.read_prefix(x[:, :M])
    outputs, edges = [y], [M, *where, T]
    for a, b in zip(edges, edges[1:]):
        y, state = mixer(x[:, a:b], state)
        outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("where", [[], [M + 1, M + 2, 70]])
def test_parity_quadratic_form(where: list[int]) -> None:
    """Scores of all queries with causal keys and, for every query, with all prefix keys; one denominator."""
    mixer = small()
    x = torch.randn(2, T, 24, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (2, -1)) for part in mixer.to_qkv(x).split(mixer.sizes, -1))
    ke, ve = (part.unflatten(-1, (2, -1)) for part in mixer.to_kv_prefix(x[:, :M]).split(mixer.sizes[1:], -1))
    causal = torch.einsum("bihf,bjhf->bhij", taylor(q), taylor(k)).tril()
    whole = torch.einsum("bihf,bjhf->bhij", taylor(q), taylor(ke))
    total = causal.sum(-1) + whole.sum(-1) + 1e-12
    o = torch.einsum("bhij,bjhd->bhid", causal, v) + torch.einsum("bhij,bjhd->bhid", whole, ve)
    want = mixer.out((o / total[..., None]).transpose(1, 2).flatten(2))
    source = "prefix-linear-attention's PrefixLinearAttention, implementation 'default', re-derived"
    assert_parity("jrt", source, two_phases(mixer, x, where), want, 1e-12)


def test_parity_without_a_prefix_it_is_based() -> None:
    mixer, based = small(), rm.mixer("based", dim=24, heads=2, feature_dim=4).double()
    based.load_state_dict({name: tensor for name, tensor in mixer.state_dict().items() if "prefix" not in name})
    x = torch.randn(2, T, 24, dtype=torch.float64)
    assert_parity("jrt", "Based", mixer(x)[0], based(x)[0], 1e-12)
    with torch.no_grad():
        mixer.to_kv_prefix.weight.zero_()  # phi(0) = [1, 0 ..] is not nothing: M counts more, of value zero
    q, k, v = (part.unflatten(-1, (2, -1)) for part in based.to_qkv(x[:, :M]).split(based.sizes, -1))
    weight = torch.einsum("bihf,bjhf->bhij", taylor(q), taylor(k)).tril()
    o = torch.einsum("bhij,bjhd->bihd", weight / (weight.sum(-1, keepdim=True) + M), v)
    assert_close("a zero prefix", mixer.read_prefix(x[:, :M])[0], mixer.out(o.flatten(2)), 1e-12)


def test_prefix_positions_see_the_whole_prefix_and_nothing_after_it() -> None:
    mixer, x = small(), torch.randn(1, M, 24, dtype=torch.float64, requires_grad=True)
    y, _ = mixer.read_prefix(x)
    (grad,) = torch.autograd.grad(y[0, 0].sum(), x)
    assert (grad.abs().amax(-1) > 0).all()
    (grad,) = torch.autograd.grad(mixer(x)[0][0, 0].sum(), x)
    assert (grad[0, 1:] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_prefix_counts_for_nothing(side: str) -> None:
    mixer, x = small(), torch.randn(3, M, 24, dtype=torch.float64)
    lengths = [M, 5, 1]
    span = Span.from_lengths(lengths, M, side)
    y, state = mixer.read_prefix(x.masked_fill(~span.valid[..., None], torch.nan), None, span)
    for row in range(3):
        want, alone = mixer.read_prefix(x[row : row + 1, span.valid[row]])
        assert_close(f"row {row}", y[row, span.valid[row]], want[0], 1e-12)
        assert_states_close(f"row {row}", state.rows([row]), alone, 1e-12)


def test_a_reset_starts_a_new_prefix() -> None:
    mixer, x = small(), torch.randn(2, M, 24, dtype=torch.float64)
    _, state = mixer(torch.randn(2, 9, 24, dtype=torch.float64))
    reset = torch.zeros(2, M, dtype=torch.bool)
    reset[0, 0] = True
    y, end = mixer.read_prefix(x, state, Span(reset=reset))
    want, _ = mixer.read_prefix(x[:1])
    assert_close("fresh", y[:1], want, 1e-12)
    want, _ = mixer.read_prefix(x[1:], state.rows([1]))
    assert_close("continued", y[1:], want, 1e-12)
    assert end.seen.tolist() == [M, M + 9]
    reset[1, 3] = True
    with pytest.raises(rm.errors.UsageError, match="middle of the prefix"):
        mixer.read_prefix(x, state, Span(reset=reset))


def test_a_model_reads_a_prefix_and_trains_on_it() -> None:
    torch.manual_seed(0)
    model = rm.model("based-stack", vocab=30, dim=32, feature_dim=4, window=8, mixer="jrt")
    ids = torch.randint(1, 30, (2, 40))
    with prefix(model):
        read = model(ids[:, :20])
    plain = model(ids[:, :20])
    assert not torch.allclose(read.logits, plain.logits, atol=1e-4)
    assert torch.equal(model(ids[:, :20]).logits, plain.logits)  # outside, the stream as before
    rest = model(ids[:, 20:], read.state)
    generator = torch.Generator().manual_seed(1)
    loss = jrt_loss(model, ids, 20, mask_id=0, mask_rate=0.0, generator=generator)
    want = F.cross_entropy(rest.logits[:, :-1].flatten(0, 1), ids[:, 21:].flatten())
    assert_close("no mask: next tokens alone", loss, want, 1e-5)
    masked = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    with prefix(model):
        read = model(ids[:, :20].masked_fill(masked, 0))
    out = model(ids[:, 20:], read.state)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 21:].flatten())
    want = want + 0.25 * F.cross_entropy(read.logits[masked], ids[:, :20][masked])
    loss = jrt_loss(model, ids, 20, mask_id=0, mask_rate=0.5, generator=torch.Generator().manual_seed(1))
    assert_close("with masked tokens", loss, want, 1e-5)
    loss.backward()
    assert model.blocks[1].mixer.to_kv_prefix.weight.grad.abs().max() > 0


def test_prompt_twice_and_wrong_use() -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert jrt_prompt(ids).tolist() == [[1, 2, 3, 1, 2, 3]] and jrt_prompt(ids, 3).shape == (1, 9)
    with pytest.raises(rm.errors.UsageError, match="times is 0"):
        jrt_prompt(ids, 0)
    with pytest.raises(rm.errors.ShapeError, match=r"\[B, T\]"):
        jrt_prompt(ids[0])
    model = rm.model("hybrid", vocab=30, dim=32)
    with pytest.raises(rm.errors.UsageError, match="no prefix linear attention"), prefix(model):
        pass
    with pytest.raises(rm.errors.UsageError, match=r"must leave two: 1\.\.1"):
        jrt_loss(model, ids, 2, mask_id=0)
