"""mLSTM: the cell's step equations, its parallel form, transformers' xLSTM layer, and both blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import remanence as rm
from helpers import assert_close, assert_gradients_close, assert_states_close, pieces
from parity import assert_parity
from remanence import Span
from remanence.errors import UsageError
from remanence.mixers.mlstm import EPS, cell, soft_cap

DIM, HEADS = 32, 4


def inputs(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, i, f with gates of every size."""
    random = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, length, 3, 4, generator=random, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, length, 3, 6, generator=random, dtype=torch.float64)
    i, f = (4 * torch.randn(2, length, 3, generator=random, dtype=torch.float64) for _ in range(2))
    return [x.to(dtype) for x in (q, k, v, i, f + 3)]


def step_equations(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The cell without a stabiliser: C and n as they are, max(|n q|, 1) and eps in the units of exp(m) that the cell has them in."""
    C, n = q.new_zeros(2, 3, 4, 6), q.new_zeros(2, 3, 4)
    m, outputs = q.new_zeros(2, 3), []
    for t in range(q.shape[1]):
        write = i[:, t].exp()[..., None] * k[:, t]
        keep = f[:, t].sigmoid()[..., None]
        C, n = keep[..., None] * C + write[..., None] * v[:, t, :, None], keep * n + write
        m = torch.maximum(F.logsigmoid(f[:, t]) + m, i[:, t]).detach()
        query = q[:, t] / 2
        size = (n * query).sum(-1).abs().clamp(min=1) + EPS * m.exp()
        outputs.append((query[..., None, :] @ C)[..., 0, :] / size[..., None])
    return torch.stack(outputs, 1), (C, n, m)


@pytest.mark.parametrize("length", [1, 2, 63, 130])
def test_parity_step_equations(length):
    leaves = [x.requires_grad_() for x in inputs(length)]
    h, (C, n, m) = cell(*leaves, None, None, "auto")
    want, (C_plain, n_plain, m_plain) = step_equations(*leaves)
    assert_parity("mlstm-7b", "the step equations without stabiliser, float64", h, want, 1e-10)
    assert_close("C", m.exp()[..., None, None] * C, C_plain, 1e-10)
    assert_close("n", m.exp()[..., None] * n, n_plain, 1e-10)
    assert_close("m", m, m_plain, 1e-12)
    dh = torch.randn(h.shape, generator=torch.Generator().manual_seed(5), dtype=h.dtype)
    names = "qkvif"
    got, wanted = (dict(zip(names, torch.autograd.grad((y * dh).sum(), leaves, materialize_grads=True))) for y in (h, want))
    assert_gradients_close("cell", got, wanted, 1e-9)


def test_parity_parallel_form():
    """log D_ts = sum of log f over s < j <= t, plus i_s; rows scaled by their maximum; the 2024 paper's training form."""
    q, k, v, i, f = (x.transpose(1, 2) for x in inputs(70, 1))  # [B, H, T, ...]
    total = F.logsigmoid(f).cumsum(-1)
    log_D = (total[..., :, None] - total[..., None, :] + i[..., None, :]).masked_fill(~torch.ones(70, 70).bool().tril(), -torch.inf)
    m = torch.maximum(log_D.amax(-1, keepdim=True), total[..., None])  # the second: what m = 0 before the first token has become
    A = (q @ k.mT) / 2 * (log_D - m).exp()
    want = A / (torch.maximum(A.sum(-1, keepdim=True).abs(), (-m).exp()) + EPS) @ v
    h, _ = cell(*inputs(70, 1), None, None, "auto")
    assert_parity("mlstm-7b", "the parallel form of arXiv 2405.04517, float64", h.transpose(1, 2), want, 1e-10)


@pytest.mark.parametrize("backend", ["auto", "naive"])
def test_cell_is_the_same_in_pieces_and_packed(backend):
    length, cuts = 90, [1, 2, 30, 64, 89]
    leaves, other = inputs(length, 2), inputs(length, 3)
    h, end = cell(*leaves, None, None, backend)
    parts, held = [], None
    for part in zip(*(pieces(x, cuts) for x in leaves)):
        y, held = cell(*part, held, None, backend)
        parts.append(y)
    assert_close("h", torch.cat(parts, 1), h, 1e-10)
    reset = torch.zeros(2, 2 * length, dtype=torch.bool)
    reset[:, length] = True
    packed, last = cell(*(torch.cat([a, b], 1) for a, b in zip(other, leaves)), None, Span(reset=reset), backend)
    assert_close("packed", packed[:, length:], h, 1e-10)
    for name, got, other_end, want in zip("Cnm", held, last, end):
        assert_close(name, got, want, 1e-10)
        assert_close(f"packed {name}", other_end, want, 1e-10)


def test_extreme_gates_are_finite():
    """An input gate that would overflow, one that never opens, and a forget gate shut for good: values and gradients."""
    q, k, v, i, f = inputs(50, 4, torch.float32)
    for gate, forget in ((i + 1e3, f), (i - 1e3, f), (i * 100, f * 100), (i, f - 1e4)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, gate, forget)]
        h, last = cell(*leaves, None, None, "auto")
        for x in (h, *last, *torch.autograd.grad(h.sum() + last[0].sum(), leaves)):
            assert x.isfinite().all()


def test_soft_cap():
    x = torch.linspace(-100, 100, 41)
    assert soft_cap(x, None) is x and soft_cap(x, 15.0).abs().max() <= 15
    assert_close("small", soft_cap(x / 1e4, 15.0), x / 1e4, 1e-6)


def randomized(module: nn.Module, scale: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(scale * torch.randn_like(weight))
    return module


@pytest.fixture(scope="module")
def theirs():
    """transformers' layer and its weights in ours; it runs chunks of 64, 32 and 16 tokens and the rest one by one."""
    xlstm = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if xlstm.external_xlstm:
        pytest.skip("the package xlstm replaces transformers' own code")
    config = xlstm.xLSTMConfig(hidden_size=DIM, num_heads=HEADS, num_hidden_layers=1)
    layer = randomized(xlstm.xLSTMLayer(config))
    ours = rm.mixer("mlstm-7b", dim=DIM, heads=HEADS)
    with torch.no_grad():
        gates = layer.igate_preact, layer.fgate_preact
        gates[0].bias.add_(-2)
        ours.to_qkvg.weight.copy_(torch.cat([layer.q.weight, layer.k.weight, layer.v.weight, layer.ogate_preact.weight]))
        ours.to_gates.weight.copy_(torch.cat([gate.weight for gate in gates]))
        ours.to_gates.bias.copy_(torch.cat([gate.bias for gate in gates]))
        ours.norm_weight.copy_(layer.multihead_norm.weight)
        ours.out.weight.copy_(layer.out_proj.weight)
    return xlstm, layer, ours


@pytest.mark.parametrize("length", [50, 64, 200])
def test_parity_transformers_layer(theirs, length):
    _, layer, ours = theirs
    torch.manual_seed(1)
    x, dy = torch.randn(2, length, DIM), torch.randn(2, length, DIM)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = ours(xs[0])[0], layer(xs[1])[0]
    assert_parity("mlstm-7b", "transformers xLSTMLayer", got, want)
    grads = [torch.autograd.grad(y, leaf, dy)[0] for y, leaf in zip((got, want), xs)]
    assert_parity("mlstm-7b", "transformers xLSTMLayer, gradient of the input", *grads)


def test_parity_transformers_functions(theirs):
    """The cell alone, from a state, with copied inputs: their chunkwise and their recurrent function, outputs and last states."""
    xlstm, _, _ = theirs
    q, k, v, i, f = inputs(128, 6, torch.float32)
    first = tuple(x[:, :40] for x in (q, k, v, i, f))
    _, (C, n, m) = cell(*first, None, None, "auto")
    h, last = cell(q, k, v, i, f, (C, n, m), None, "auto")
    names = {"query": q, "key": k, "value": v, "igate": i, "fgate": f}
    theirs_in = {name: x.transpose(1, 2).contiguous() for name, x in names.items()}
    start = {"c_initial": C, "n_initial": n, "m_initial": m[..., None], "return_last_states": True}
    for rule in ("mlstm_chunkwise_native_autograd", "mlstm_recurrent_sequence_native"):
        want, (c_end, n_end, m_end) = getattr(xlstm, rule)(**theirs_in, **start)
        assert_parity("mlstm-7b", f"transformers {rule}", h.transpose(1, 2), want)
        for name, got, end in zip("Cnm", last, (c_end, n_end, m_end[..., 0])):
            assert_close(f"{rule} {name}", got, end, 1e-5)


def block_2024(mixer: nn.Module, x: Tensor) -> Tensor:
    """The 2024 block from its equations, token by token in its convolution and cell."""
    inner, blocks = mixer.inner, mixer.inner // 4
    u, z = (x @ mixer.to_uz.weight.T).split(inner, -1)
    padded = F.pad(u, (0, 0, 3, 0))
    c = F.silu(sum(padded[:, j : j + x.shape[1]] * mixer.conv.weight[:, j] for j in range(4)) + mixer.conv.bias)

    def headwise(inp: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([inp[..., 4 * n : 4 * n + 4] @ weight[n].T for n in range(blocks)], -1)

    q, k, v = (headwise(inp, weight) for inp, weight in zip((c, c, u), mixer.to_qkv))
    i, f = (torch.cat([q, k, v], -1) @ mixer.to_gates.weight.T + mixer.to_gates.bias).split(HEADS, -1)
    heads = [part.unflatten(-1, (HEADS, -1)) for part in (q, k, v)]
    C, n, m, outputs = 0.0, 0.0, torch.zeros(()), []
    for t in range(x.shape[1]):
        q_t, k_t, v_t = (part[:, t] for part in heads)
        new = torch.maximum(F.logsigmoid(f[:, t]) + m, i[:, t])
        keep, write = (F.logsigmoid(f[:, t]) + m - new).exp()[..., None], (i[:, t] - new).exp()[..., None] * k_t
        C, n, m = keep[..., None] * C + write[..., None] * v_t[..., None, :], keep * n + write, new
        q_t = q_t * q_t.shape[-1] ** -0.5
        size = torch.maximum((q_t * n).sum(-1).abs(), (-m).exp()) + EPS
        outputs.append((q_t[..., None, :] @ C)[..., 0, :] / size[..., None])
    h = F.group_norm(torch.stack(outputs, 1).flatten(0, 1).flatten(1), HEADS, mixer.norm_weight, eps=1e-5).view_as(u)
    return ((h + mixer.skip * c) * F.silu(z)) @ mixer.out.weight.T


def test_parity_2024_block():
    mixer = randomized(rm.mixer("mlstm", dim=DIM, heads=HEADS, block="2024")).double()
    x = torch.randn(2, 40, DIM, dtype=torch.float64)
    with torch.no_grad():
        assert_parity("mlstm-7b", "the 2024 block, re-derived, float64", mixer(x)[0], block_2024(mixer, x), 1e-9)


def test_2024_block_in_pieces_padded_and_packed():
    mixer, x = randomized(rm.mixer("mlstm", dim=DIM, block="2024")), torch.randn(2, 60, DIM)
    with torch.no_grad():
        y, end = mixer(x)
        outputs, state = [], None
        for part in pieces(x, [1, 2, 20, 59]):
            out, state = mixer(part, state)
            outputs.append(out)
        assert_close("pieces", torch.cat(outputs, 1), y, 1e-5)
        assert_states_close("pieces", state, end, 1e-5)
        reset = torch.zeros(2, 65, dtype=torch.bool)
        reset[:, [0, 5]] = True
        packed, last = mixer(torch.cat([torch.randn(2, 5, DIM), x], 1), state, Span(reset=reset))
        assert_close("packed", packed[:, 5:], y, 1e-5)
        assert_states_close("packed", last, end, 1e-5)
        short, held = mixer(torch.cat([x[:, :7], torch.full((2, 3, DIM), torch.nan)], 1), None, Span.from_lengths([7, 7], 10))
        assert_close("padded", short[:, :7], y[:, :7], 1e-5)
        assert_close("continued", mixer(x[:, 7:], held)[0], y[:, 7:], 1e-5)


def test_initial_values_are_the_papers():
    for block, low, high in (("7b", -10, -10), ("2024", -1, 1)):
        mixer = rm.mixer("mlstm", dim=64, heads=4, block=block)
        i, f = mixer.to_gates.bias.detach().chunk(2)
        assert low <= i.min() and i.max() <= high and not mixer.to_gates.weight.any()
        assert f.tolist() == pytest.approx([3, 4, 5, 6])


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"block": "2025"}, "block is '2025'"),
        ({"heads": 5}, "heads=5 does not divide dim=32"),
        ({"qk_factor": 0.1}, "qk_factor=0.1 makes 3 key channels"),
        ({"gate_cap": -1.0}, "gate_cap is -1.0"),
        ({"block": "2024", "heads": 5}, "heads=5 does not divide expand"),
    ],
)
def test_bad_hyper_parameters(hyper, message):
    with pytest.raises(UsageError, match=message):
        rm.mixer("mlstm-7b", dim=DIM, **hyper)
