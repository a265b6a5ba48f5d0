"""The Based model: which layer is where."""

import torch

import remanence as rm


def test_layers_are_those_of_the_released_model() -> None:
    model = rm.model("based-stack", vocab=20, dim=32, repeat=2, window=16)
    slugs = [block.mixer.slug for block in model.blocks]
    assert slugs == ["base-conv", "based", "attention", "base-conv", "base-conv"] * 2
    assert model.blocks[2].mixer.window == 16 and model.blocks[2].mixer.rope_dims == 8
    loss = model(torch.randint(20, (2, 40)), targets=torch.randint(20, (2, 40))).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
