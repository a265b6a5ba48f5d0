"""The bidirectional encoder: both directions, padding, equal parameters with a recurrence, and the masked-LM loss."""

from __future__ import annotations

import pytest
import torch

from helpers import assert_close
from remanence.errors import ShapeError, UsageError
from remanence.models.encoder import Encoder, mask_tokens, masked_lm_loss


def small(recurrence: str | None = "simple-recurrence-mlm") -> Encoder:
    torch.manual_seed(0)
    return Encoder(vocab=30, dim=32, depth=2, max_length=40, recurrence=recurrence)


def count(model: Encoder) -> int:
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("recurrence", [None, "simple-recurrence-mlm", "mingru"])
def test_padding_is_invisible_and_both_directions_are_read(recurrence: str | None) -> None:
    model, ids = small(recurrence).eval(), torch.randint(30, (3, 20))
    valid = torch.ones(3, 20, dtype=torch.bool)
    valid[0, 12:] = valid[1, :8] = valid[2] = False
    logits = model(ids, valid)
    assert_close("padded on the right", logits[0, :12], model(ids[:1, :12])[0], 1e-5)
    assert_close("padded on the left", logits[1, 8:], model(ids[1:2, 8:])[0], 1e-5)
    assert logits.isfinite().all()
    for at, seen in ((19, 0), (0, 19)):
        other = ids[:1].clone()
        other[0, at] = (other[0, at] + 1) % 30
        assert not torch.equal(model(other)[0, seen], model(ids[:1])[0, seen])


def test_the_recurrence_is_paid_for_by_the_feed_forward() -> None:
    plain, swish = small(None), small()
    assert count(plain) - 2 * 65 <= count(swish) <= count(plain)  # at most one hidden unit a block is lost
    with pytest.raises(UsageError, match="more than the feed-forward has to give"):
        Encoder(vocab=30, dim=32, ffn=1.0)


def test_masking() -> None:
    ids = torch.randint(28, (64, 100), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(100) < 90
    inputs, targets = mask_tokens(ids, 29, 28, valid.expand(64, -1), generator=torch.Generator().manual_seed(1))
    asked = targets != -100
    assert not asked[:, 90:].any() and torch.equal(targets[asked], ids[asked]) and torch.equal(inputs[~asked], ids[~asked])
    assert abs(float(asked[:, :90].float().mean()) - 0.15) < 0.02
    assert abs(float((inputs[asked] == 29).float().mean()) - 0.8) < 0.05
    assert abs(float((inputs[asked] == ids[asked]).float().mean()) - 0.1 - 0.1 / 28) < 0.05
    with pytest.raises(UsageError, match="rate is 0"):
        mask_tokens(ids, 29, 28, rate=0)


def test_it_learns_from_both_sides() -> None:
    """A masked token of a row that repeats one symbol is known from any other token."""
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(2)
    for _ in range(60):
        ids = torch.randint(28, (16, 1), generator=random).expand(-1, 12)
        inputs, targets = mask_tokens(ids, 29, 28, generator=random)
        loss = masked_lm_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 2.0  # chance is log(28) = 3.3
    assert masked_lm_loss(model(inputs), torch.full_like(targets, -100)) == 0


def test_wrong_input_is_refused() -> None:
    model = small()
    for ids in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 41, dtype=torch.long), torch.zeros(4, dtype=torch.long)):
        with pytest.raises(ShapeError, match="expects .B, T. with 1 <= T <= 40"):
            model(ids)
    with pytest.raises(ShapeError, match="valid is torch.int64"):
        model(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(UsageError, match="heads=5 does not divide dim=32"):
        Encoder(vocab=30, dim=32, heads=5)
