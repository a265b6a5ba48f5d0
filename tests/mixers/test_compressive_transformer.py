"""The Compressive Transformer against its equations in a loop, as a Transformer-XL, and its compression's own loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close, assert_gradients_close
from parity import assert_parity
from remanence.errors import UsageError
from remanence.mixers.compressive_transformer import CompressiveTransformer
from remanence.mixers.relative_attention import sinusoids

DIM, H, S = 16, 2, 6


def build(memory: int = 9, compressed: int = 4, ratio: int = 3, compression: str = "conv") -> CompressiveTransformer:
    """With weights large enough that positions matter."""
    mixer = rm.mixer(
        "compressive-transformer", dim=DIM, heads=H, segment=S, memory=memory, compressed=compressed, ratio=ratio, compression=compression
    )
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.4)
    return mixer.double()  # type: ignore[return-value]


def relative(mixer: CompressiveTransformer, h: Tensor, both: Tensor) -> Tensor:
    """Relative attention of h, the last of `both`, to all of `both`, one query and key at a time for the positions."""
    q, k, v = (y.unflatten(-1, (H, -1)) for y in mixer.to_qkv(both).chunk(3, -1))
    q = q[:, -h.shape[1] :]
    r = (sinusoids(both.shape[1], DIM, h.device, h.dtype) @ mixer.to_r.weight.T).unflatten(-1, (H, -1))
    offset = both.shape[1] - h.shape[1]
    score = h.new_full((len(h), H, h.shape[1], both.shape[1]), -torch.inf)
    for i in range(h.shape[1]):
        for j in range(i + offset + 1):
            far = ((q[:, i] + mixer.v) * r[i + offset - j]).sum(-1)
            score[:, :, i, j] = (((q[:, i] + mixer.u) * k[:, j]).sum(-1) + far) * (DIM // H) ** -0.5
    return mixer.out(torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v).flatten(2))


def loop(mixer: CompressiveTransformer, x: Tensor) -> Tensor:
    memory, short, outputs, M, c = x[:, :0], x[:, :0], [], mixer.memory, mixer.ratio
    for h in x.split(S, 1):
        outputs.append(relative(mixer, h, torch.cat([short, memory, h], 1)))
        both = torch.cat([memory, h], 1)
        lost, memory = both[:, : max(both.shape[1] - M, 0)], both[:, max(both.shape[1] - M, 0) :]
        blocks = [lost[:, i : i + c].detach() for i in range(0, lost.shape[1] - c + 1, c)]
        if mixer.conv is not None:
            new = [torch.einsum("bcd,odc->bo", block, mixer.conv.weight) + mixer.conv.bias for block in blocks]
        else:
            new = [block.mean(1) if mixer.compression == "mean" else block.max(1).values for block in blocks]
        short = torch.cat([short, *(y[:, None].detach() for y in new)], 1)[:, -mixer.compressed :]
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("compression", ["conv", "mean", "max"])
def test_parity_with_the_equations(compression: str) -> None:
    mixer, x = build(compression=compression), torch.randn(2, 6 * S, DIM, dtype=torch.float64)
    got, want = mixer(x)[0], loop(mixer, x)
    assert_parity("compressive-transformer", f"the equations in a loop, {compression}", got, want, 1e-10)
    leaves = {name: weight for name, weight in mixer.named_parameters() if not name.startswith("conv")}
    grads = [dict(zip(leaves, torch.autograd.grad(y.square().sum(), list(leaves.values())))) for y in (got, want)]
    assert_gradients_close("compressive-transformer", *grads, tol=1e-9)


def test_parity_with_transformer_xl_at_ratio_one() -> None:
    """f the identity: N compressed entries are N more of memory."""
    mixer, x, memory = build(7, 5, 1, "mean"), torch.randn(2, 5 * S + 2, DIM, dtype=torch.float64), 12
    want, held = [], x[:, :0]
    for h in x.split(S, 1):
        both = torch.cat([held, h], 1)
        want.append(relative(mixer, h, both))
        held = both[:, -memory:]
    assert_parity("compressive-transformer", "Transformer-XL of memory M + N, ratio 1", mixer(x)[0], torch.cat(want, 1), 1e-10)


def test_no_gradient_of_the_output_reaches_the_compression() -> None:
    mixer = build()
    mixer(torch.randn(1, 6 * S, DIM, dtype=torch.float64))[0].square().sum().backward()
    assert all(weight.grad is None for weight in mixer.conv.parameters()) and mixer.to_qkv.weight.grad is not None


@pytest.mark.parametrize("memory", [3, 6, 9])
def test_the_reconstruction_loss_is_the_paper_s_and_trains_the_compression_only(memory: int) -> None:
    mixer, x = build(memory), torch.randn(2, 5 * S, DIM, dtype=torch.float64, requires_grad=True)

    def attention(h: Tensor, kv: Tensor) -> Tensor:
        (q, _, _), (_, k, v) = ((y.unflatten(-1, (H, -1)) for y in mixer.to_qkv(z).chunk(3, -1)) for z in (h, kv))
        weight = (torch.einsum("bihd,bjhd->bhij", q, k) * (DIM // H) ** -0.5).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weight, v)

    terms, held = [], x[:, :0]
    for h in x.split(S, 1):
        both = torch.cat([held, h], 1)
        if held.shape[1] == memory:  # the memory is full, and loses S inputs to this segment
            lost = both[:, :S]
            terms.append((attention(h, lost) - attention(h, mixer.compress(lost))).square().sum((2, 3)))
        held = both[:, -memory:]
    loss = mixer.reconstruction_loss(x)
    assert_close("loss", loss, torch.cat(terms, 1).mean(), 1e-10)
    loss.backward()
    assert x.grad is None and all((weight.grad is not None) == name.startswith("conv") for name, weight in mixer.named_parameters())


def test_the_reconstruction_loss_falls() -> None:
    mixer, x = build(6).float(), torch.randn(4, 8 * S, DIM)
    optimizer, losses = torch.optim.Adam(mixer.conv.parameters(), 1e-2), []
    for _ in range(30):
        losses.append(loss := mixer.reconstruction_loss(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_a_sequence_that_loses_nothing_has_no_reconstruction_loss() -> None:
    with pytest.raises(UsageError, match="after 18"):
        build(9).reconstruction_loss(torch.randn(1, 17, DIM, dtype=torch.float64))
