"""Every mixer and memory gives on a GPU what it gives on a CPU, and continues a state that was moved there: `make gpu`."""

from __future__ import annotations

import copy

import pytest
import torch

import remanence as rm
from helpers import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]


@pytest.mark.parametrize("entry", rm.catalog("mixer"), ids=lambda entry: entry.slug)
def test_mixers(entry):
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    here = rm.mixer(entry.slug, dim=32, **entry.example)
    there = copy.deepcopy(here).cuda()
    x = torch.randn(2, 90, 32)
    y, state = here(x)
    z, moved = there(x.cuda())
    assert_close("output", z.cpu(), y, 1e-4)
    assert_close("continued", there(x.cuda(), state.to("cuda"))[0].cpu(), here(x, moved.to("cpu"))[0], 1e-4)
    z.sum().backward()
    y.sum().backward()
    for (name, p), q in zip(here.named_parameters(), there.parameters()):
        assert_close(name, q.grad.cpu(), p.grad, 1e-3)


@pytest.mark.parametrize("slug", [entry.slug for entry in rm.catalog("segment-memory")])
def test_segment_memories(slug):
    torch.manual_seed(0)
    backbone = rm.model(rm.ModelConfig(vocab=50, dim=32, layers="attention, gated-deltanet"))
    here = rm.memory(slug, backbone=backbone, segment=16)
    there = copy.deepcopy(here).cuda()
    ids = torch.randint(0, 50, (2, 70))
    assert_close("logits", there(ids.cuda()).logits.cpu(), here(ids).logits, 1e-4)
