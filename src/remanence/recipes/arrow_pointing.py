"""arrow-pointing: does what was learned on small pictures hold on larger ones? pLSTM-Vis, Mamba-ND and a ViT (arXiv 2506.11997).

Trained on canvases of 64 x 64, never the same picture twice, and tested on 64 and on 128 with arrows and discs of the same size.
`remanence train arrow-pointing`; some of the models: `--memory plstm-vis,vit`.

Not the paper's protocol in three ways, each for a budget of minutes: the task's small version, models of four layers and width 64, and
fresh pictures in place of 100,000 fixed ones. The ViT's and Mamba-ND's learned positions are stretched to the larger grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import find
from ..domains.vision.vit import ViT, resized
from ..errors import unknown
from ..models import Model
from ..state import State
from ..tasks.arrow_pointing import ArrowPointing
from ..train import Piece, Run, TrainConfig, environment
from ._results import Row, lines, merge_rows, named_once, plot, refuse_folder

SIDE, PATCH, DIM, DEPTH = 64, 8, 64, 4
TESTED = (64, 128)
MODELS = ("plstm-vis", "mamba-nd", "vit")


class PictureState(State):
    """What the training loop carries from picture to picture: nothing."""

    seen: Tensor  # [B] int64, zeros


def build_net(name: str, side: int) -> nn.Module:
    """A fresh model for pictures of side x side, one channel, two classes."""
    common: dict[str, Any] = {"patch": PATCH, "channels": 1, "num_classes": 2, "dim": DIM, "depth": DEPTH}
    if name == "vit":
        return ViT(size=side, **common)
    return find(name, ("vision",)).builder(**common, **({"size": (side, side)} if name == "mamba-nd" else {}))


class Pictures(Model):
    """logits [B, 2] of pictures [B, side, side]: one of MODELS in the clothes that the training loop and its checkpoints expect."""

    kind = "pictures"

    def __init__(self, name: str, side: int = SIDE):
        super().__init__()
        if name not in MODELS:
            raise unknown("model", name, MODELS)
        self.config = {"name": name, "side": side}
        self.name, self.vocab, self.dim = name, 2, DIM
        self.net = build_net(name, side)

    @classmethod
    def build(cls, config: dict[str, Any]) -> Pictures:
        return cls(**config)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return self.net(images[:, None])

    def at(self, side: int) -> nn.Module:
        """The same weights for another canvas: as they are, but for Mamba-ND, whose order of patches and positions are of one size."""
        if self.name != "mamba-nd" or side == self.config["side"]:
            return self
        large = Pictures(self.name, side).to(self.device)
        weights = self.state_dict()
        grid = self.config["side"] // PATCH
        positions = weights["net.positions"].unflatten(0, (grid, grid))
        weights["net.positions"] = resized(positions, side // PATCH, side // PATCH).flatten(0, 1)
        large.load_state_dict(weights)
        return large.eval()


def pictures(seed: int, n: int, side: int) -> tuple[Tensor, Tensor]:
    """images float32 [n, side, side] and labels [n] of the task's small version."""
    examples = ArrowPointing().sample(seed=seed, n=n, version="small", side=side)
    images = torch.from_numpy(np.stack([example.image for example in examples]))
    return images, torch.tensor([example.label for example in examples])


class Batches:
    """Fresh pictures for every update; `Piece.ids` are the pictures."""

    carries = False

    def __init__(self, rows: int):
        self.rows = rows

    def batch(self, seed: int, index: int) -> Piece:
        images, labels = pictures(int(np.random.default_rng([seed, index]).integers(1 << 62)), self.rows, SIDE)
        return Piece(images, labels[:, None])


def loss(model: Pictures, piece: Piece, state: State | None) -> tuple[Tensor, State, dict[str, Tensor]]:
    """Summed cross-entropy of the labels, and the fraction of them that is right."""
    assert piece.targets is not None
    labels, logits = piece.targets[:, 0], model(piece.ids).float()
    empty = PictureState(seen=torch.zeros_like(labels))
    return F.cross_entropy(logits, labels, reduction="sum"), empty, {"accuracy": (logits.argmax(-1) == labels).float().mean()}


@torch.no_grad()
def accuracy(model: Pictures, side: int, n: int, seed: int, rows: int = 64) -> float:
    """The fraction of n pictures of side x side that is right; they depend on seed and side only."""
    net, right = model.at(side), 0
    images, labels = pictures(int(np.random.default_rng([seed, side, 0x7E57]).integers(1 << 62)), n, side)
    for part, wanted in zip(images.split(rows), labels.split(rows)):
        right += int((net(part.to(model.device)).argmax(-1).cpu() == wanted).sum())
    return right / n


def recipe(
    out: str | Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    fast: bool = False,
    data: str | Path | None = None,
    memory: str | None = None,
) -> Run:
    """memory: models of MODELS, separated by commas; default all of them."""
    refuse_folder(data, "arrow-pointing draws its own pictures")
    names = named_once(memory or ",".join(MODELS), "model")
    runs = [_run(name, seed, steps or (3 if fast else 4000), device, fast) for name in names]
    runs[0].others = tuple(runs[1:])
    return runs[0]


def _run(name: str, seed: int, steps: int, device: str, fast: bool) -> Run:
    n = 16 if fast else 1024
    torch.manual_seed(seed)
    model = Pictures(name)
    config = TrainConfig(
        steps=steps, lr=1e-3, schedule="cosine", warmup=min(200, steps // 10), weight_decay=0.05, beta2=0.98, seed=seed, device=device,
        best="accuracy", maximize=True, eval_every=max(1, steps // 10), checkpoint_every=max(1, steps // 20),
    )  # fmt: skip

    def evaluate(model: Model) -> dict[str, float]:
        return {"accuracy": accuracy(model, SIDE, n // 2, seed)}  # type: ignore[arg-type]

    def finish(model: Model, out: Path) -> None:
        common = {
            "task": "arrow-pointing", "model": name, "memory": name, "trained": SIDE, "n": n, "seed": seed, "steps": steps,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }  # fmt: skip
        rows: list[Row] = [common | {"canvas": side, "accuracy": accuracy(model, side, n, seed + 1)} for side in TESTED]  # type: ignore[arg-type]
        meta = {"recipe": "arrow-pointing", "patch": PATCH, "dim": DIM, "depth": DEPTH, "environment": environment(model.device)}
        curves = lines(merge_rows(out / "results.json", rows, name, meta), lambda row: row["model"], "canvas")
        plot(out / "curve.png", curves, "side of the canvas in pixels", "accuracy", lambda axes: axes.axhline(0.5, color="grey", ls=":"))

    return Run(model, Batches(8 if fast else 64), config, evaluate, finish, loss, name=name)
