"""xLSTM[a:b]: which layers are which, the shapes of the published stacks, and a model of them in pieces."""

from __future__ import annotations

import pytest
import torch

import remanence as rm
from helpers import assert_close
from remanence.errors import UsageError
from remanence.models.xlstm import xlstm_layers


@pytest.mark.parametrize(("ratio", "layers", "want"), [
    ("1:0", 3, "mmm"),
    ("0:1", 2, "ss"),
    ("1:1", 4, "msms"),
    ("7:1", 16, "msmmmmmm" * 2),
    ("2:2", 4, "mssm"),
])  # fmt: skip
def test_order_of_the_layers(ratio, layers, want):
    assert "".join(str(spec["mixer"])[0] for spec in xlstm_layers(layers, ratio, 4, "2024")) == want


def test_feed_forwards():
    """The 2024 mLSTM block has none, the 7B's is 8/3 wide, sLSTM's 4/3."""
    old, new = (xlstm_layers(2, "1:1", 4, block) for block in ("2024", "7b"))
    assert [spec["ffn"] for spec in old] == [0, 4 / 3] and [spec["ffn"] for spec in new] == [8 / 3, 4 / 3]


@pytest.mark.parametrize("block", ["2024", "7b"])
def test_a_model_in_pieces(block):
    torch.manual_seed(0)
    model = rm.model("xlstm", vocab=13, dim=32, layers=2, ratio="1:0", block=block)
    ids = torch.randint(13, (2, 40))
    want = model(ids, targets=ids)
    first = model(ids[:, :11])
    assert_close("logits", model(ids[:, 11:], first.state).logits, want.logits[:, 11:], 1e-5)
    want.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"ratio": "7-1"}, "ratio is '7-1'"),
        ({"ratio": "0:0"}, "ratio is '0:0'"),
        ({"layers": 6}, "layers=6 is not a multiple of 8"),
        ({"block": "1997"}, "block is '1997'"),
    ],
)
def test_bad_hyper_parameters(hyper, message):
    with pytest.raises(UsageError, match=message):
        rm.model("xlstm", vocab=13, **hyper)
