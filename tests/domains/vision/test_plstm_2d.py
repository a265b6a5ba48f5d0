"""pLSTM-Vis: its gates on the grid, the four corners, pictures of any size; and the small ViT beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.domains.vision.plstm_2d import PLSTM2D, PLSTMVis
from remanence.domains.vision.vit import ViT, resized
from remanence.ops.dag import grid

MODES = [("P", "L", False), ("P", "L", True), ("D", "L", False), ("D", "R", False)]


def random_(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.double()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parity_with_the_loop_over_edges(mode: tuple[str, str, bool]) -> None:
    torch.manual_seed(0)
    layer = random_(PLSTM2D(8, 2, *mode))
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    got = layer(x)
    for form in ("naive", "states"):
        layer.form = form  # type: ignore[assignment]
        assert_parity("plstm-vis", "the rule in a loop over the edges of the grid", got, layer(x), 1e-11)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_flipped_picture_is_a_flipped_output(mode: tuple[str, str, bool]) -> None:
    """With gates that are the same for all corners and a symmetric convolution, no corner is special."""
    torch.manual_seed(0)
    layer = random_(PLSTM2D(8, 2, *mode))
    with torch.no_grad():
        kernel = layer.conv.weight
        kernel.copy_((kernel + kernel.flip(2) + kernel.flip(3) + kernel.flip(2, 3)) / 4)
        for gates in (layer.to_gates.weight, layer.to_gates.bias):
            corners = gates.unflatten(0, (-1, 4, 2))
            corners.copy_(corners.mean(1, keepdim=True).expand_as(corners))
        if mode[0] == "P":
            layer.angle.copy_(layer.angle.mean(0))
            layer.to_angle.copy_(layer.to_angle.mean(0))
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    for axes in ((1,), (2,), (1, 2)):
        assert_close(f"flip {axes}", layer(x.flip(axes)), layer(x).flip(axes), 1e-11)


def mass(layer: PLSTM2D, rows: int, columns: int) -> Tensor:
    """What one unit of source in the top left corner adds up to on each anti-diagonal of edges, [rows + columns - 1, H]."""
    torch.manual_seed(0)
    source, transition, _ = (part[:, :, :, 0] for part in layer.gates(torch.randn(1, rows, columns, layer.out.in_features).double()))
    one = torch.zeros_like(source)
    one[:, 0, 0, :, 0] = 1
    first = torch.zeros(*source.shape[:-1], 1, dtype=source.dtype)
    first[:, 0, 0] = 1
    read, _ = grid(torch.ones_like(first), first, first, one, transition, torch.ones_like(one))
    by_node = read[0, ..., 0]  # [X, Y, H], what enters each node
    return torch.stack([sum(by_node[x, d - x] for x in range(rows) if 0 <= d - x < columns) for d in range(1, rows)])  # type: ignore[misc]


def test_p_mode_sends_a_ray_and_nothing_grows() -> None:
    """With T = 1 the mass of a unit is 1 on every anti-diagonal; with the code's complement too; with T < 1 the paper's form loses mass."""
    for complement in (False, True):
        layer = random_(PLSTM2D(8, 2, "P", complement=complement))
        with torch.no_grad():
            layer.to_gates.weight[:8].zero_()
            layer.to_gates.bias[:8] = 50.0
        assert_close("mass", mass(layer, 6, 6), torch.ones(5, 2, dtype=torch.float64), 1e-9)
    with torch.no_grad():
        layer.to_gates.bias[:8] = 1.0
    assert_close("the complement keeps it", mass(layer, 6, 6), torch.ones(5, 2, dtype=torch.float64), 1e-9)
    layer.complement = False  # type: ignore[assignment]
    assert (mass(layer, 6, 6).diff(dim=0) < 0).all()


def test_d_mode_has_one_path_between_two_nodes() -> None:
    """With all gates 1 every node that can be reached reads a unit once, not the binomial number of times; turning down only."""
    layer = PLSTM2D(4, 1, "D", chirality="L").double()
    _, transition, _ = layer.gates(torch.zeros(1, 4, 5, 4, dtype=torch.float64))
    ones = (transition[:, :, :, 0] > 0).double()
    first = torch.zeros(1, 4, 5, 1, 1, dtype=torch.float64)
    first[:, 0, 0] = 1
    both = torch.ones(1, 4, 5, 1, 2, dtype=torch.float64)
    read, _ = grid(torch.ones_like(first), first, first, both, ones, both)
    want = torch.ones(4, 5, dtype=torch.float64)
    want[0, 0] = 0
    assert_close("paths", read[0, ..., 0, 0], want, 1e-12)


def test_pictures_of_any_size_and_a_step_of_training() -> None:
    torch.manual_seed(0)
    for pool in ("corners", "mean"):
        model = rm.find("plstm-vis").builder(patch=4, channels=1, num_classes=2, dim=16, depth=2, heads=2, pool=pool)
        for size in ((8, 8), (4, 12), (20, 8)):
            assert model(torch.randn(2, 1, *size)).shape == (2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        x, y = torch.randn(16, 1, 12, 12), torch.arange(16) % 2
        losses = []
        for _ in range(30):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_vit_stretches_its_positions() -> None:
    torch.manual_seed(0)
    model = ViT(16, 4, 1, 2, 16, 2, 2)
    assert model(torch.randn(2, 1, 16, 16)).shape == model(torch.randn(2, 1, 32, 24)).shape == (2, 2)
    assert resized(model.positions, 4, 4) is model.positions
    ramp = torch.arange(4.0)[:, None, None].expand(4, 4, 2)
    wide = resized(ramp, 8, 8)
    assert wide.shape == (8, 8, 2) and (wide[1:, :, 0] >= wide[:-1, :, 0]).all()


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(rm.errors.UnknownName, match="mode 'Q' is not known"):
        PLSTM2D(8, 2, "Q")
    with pytest.raises(rm.errors.UnknownName, match="chirality 'U' is not known"):
        PLSTM2D(8, 2, "D", "U")
    with pytest.raises(rm.errors.UsageError, match="heads=3 does not divide dim=8"):
        PLSTM2D(8, 3)
    with pytest.raises(rm.errors.UnknownName, match="pool 'middle' is not known"):
        PLSTMVis(pool="middle")
    with pytest.raises(rm.errors.ShapeError, match="both multiples of patch=8"):
        PLSTMVis(8, 1, 2, 16, 1)(torch.zeros(1, 1, 12, 16))
