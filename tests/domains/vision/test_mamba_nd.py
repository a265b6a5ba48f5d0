"""Mamba-ND: the directions, and that a layer is the one-dimensional mixer on permuted tokens."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close
from parity import assert_parity
from remanence.domains.vision import MambaND
from remanence.domains.vision.mamba_nd import scan_order

SMALL = {"size": (4, 6), "patch": 2, "dim": 16, "depth": 5, "num_classes": 3}


def test_directions_of_a_picture() -> None:
    """Patches 0 1 2 / 3 4 5."""
    orders = {name: scan_order([2, 3], name).tolist() for name in ("H+", "H-", "W+", "W-")}
    assert orders == {"H+": [0, 1, 2, 3, 4, 5], "H-": [5, 4, 3, 2, 1, 0], "W+": [0, 3, 1, 4, 2, 5], "W-": [5, 2, 4, 1, 3, 0]}


def test_directions_of_a_film() -> None:
    grid = torch.arange(24).reshape(2, 3, 4)  # [T, H, W]
    assert scan_order([2, 3, 4], "T+").tolist() == grid.flatten().tolist()
    assert scan_order([2, 3, 4], "H+").tolist() == grid.transpose(0, 1).flatten().tolist()
    assert scan_order([2, 3, 4], "W-").tolist() == grid.movedim(2, 0).flatten().flip(0).tolist()


def test_layers_take_turns() -> None:
    assert MambaND(**SMALL).directions == ["H+", "H-", "W+", "W-", "H+"]
    film = MambaND(size=(4, 4, 4), patch=(2, 2, 2), dim=8, depth=6, num_classes=2, channels=1)
    assert film.directions == ["H+", "H-", "W+", "W-", "T+", "T-"]
    assert film(torch.randn(2, 1, 4, 4, 4)).shape == (2, 2)


@pytest.mark.parametrize("mixer", ["mamba", "mingru"])
@pytest.mark.parametrize("turn", ["H+", "H-", "W+", "W-"])
def test_parity_a_layer_is_the_permuted_mixer(mixer: str, turn: str) -> None:
    torch.manual_seed(0)
    model = MambaND(**SMALL | {"depth": 1}, mixer=mixer, directions=[turn])
    block, h = model.blocks[0], torch.randn(2, 6, 16)
    order = scan_order(model.grid, turn)
    want = torch.empty_like(h)
    want[:, order] = block.mixer(block.norm(h)[:, order])[0]
    assert_parity("mamba-nd", f"{mixer} on permuted tokens", block(h), h + want, 1e-6)


def test_columns_of_a_picture_are_rows_of_its_transpose() -> None:
    torch.manual_seed(0)
    by_rows, by_columns = (MambaND(size=(4, 4), patch=2, dim=16, depth=2, num_classes=3, directions=[turn]) for turn in ("H+", "W+"))
    by_columns.load_state_dict(by_rows.state_dict())
    with torch.no_grad():
        for model in (by_rows, by_columns):
            model.positions.zero_()
            model.embed.weight.copy_((model.embed.weight + model.embed.weight.mT) / 2)
        by_columns.embed.weight.copy_(by_rows.embed.weight)
        x = torch.randn(2, 3, 4, 4)
        assert_close("logits", by_columns(x.mT), by_rows(x), 1e-5)


def test_it_learns_which_corner_is_bright() -> None:
    torch.manual_seed(0)
    model = MambaND(size=(8, 8), patch=2, channels=1, dim=16, depth=4, num_classes=4, hyper={"state_size": 4})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    corners = torch.arange(4).repeat(16)
    x = 0.3 * torch.randn(64, 1, 8, 8)
    for picture, corner in zip(x, corners.tolist()):
        picture[0, 4 * (corner // 2) :, 4 * (corner % 2) :][:4, :4] += 1
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(x), corners)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


def test_bad_input() -> None:
    with pytest.raises(rm.errors.UsageError, match="patch along W=4 does not divide size along W=6"):
        MambaND(**SMALL | {"patch": 4})
    with pytest.raises(rm.errors.UsageError, match="it must be"):
        MambaND(size=(4,), patch=2)
    with pytest.raises(rm.errors.UsageError, match="one for each of the 2 axes"):
        MambaND(**SMALL | {"patch": (2, 2, 2)})
    with pytest.raises(rm.errors.UsageError, match="direction is 'T\\+'"):
        MambaND(**SMALL, directions=["T+"])
    with pytest.raises(rm.errors.UnknownName, match="mamba"):
        MambaND(**SMALL, mixer="mambo")
    with pytest.raises(rm.errors.ShapeError, match=r"\[B, 3, 4, 6\]"):
        MambaND(**SMALL)(torch.zeros(1, 3, 6, 4))
