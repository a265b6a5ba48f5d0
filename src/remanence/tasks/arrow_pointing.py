"""Arrow pointing: does the arrow point at the disc? Asked on a larger canvas than any seen in training (benchmark of pLSTM, 2506.11997).

Positions, angles, lengths and labels are those of ml-jku/arrow_pointing_dataset, draw by draw, for the same seed and settings. Its
pictures are drawn by an image library; ours by distance fields, so edges are smooth and pixels differ slightly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..catalog import system
from ..errors import UsageError, unknown
from .base import Task

FACTOR = 1.2
"""An arrow that points at the disc passes within radius / 1.2 of its centre; one that does not stays outside 1.2 radius."""


@dataclass(frozen=True)
class Canvas:
    """What is drawn where: side and padding in pixels, and (low, high) of the disc's radius and of the shaft's length and width."""

    side: int
    padding: int
    radius: tuple[float, float]
    shaft: tuple[float, float]
    width: tuple[float, float]


VERSIONS = {
    "small": Canvas(64, 8, (4, 8), (8, 14), (1, 2)),
    "full": Canvas(192, 30, (15, 30), (10, 30), (2, 3)),
}
"""full: the official training set, tested at side 384. small (ours): for a CPU, tested at side 128."""


@dataclass(frozen=True)
class Scene:
    """An arrow by its centre (x, y), angle in radians (y points down), shaft and width; a disc by its centre and radius. In pixels."""

    arrow: tuple[float, float]
    angle: float
    shaft: int
    width: int
    disc: tuple[float, float]
    radius: float


@dataclass(frozen=True, eq=False)
class ImageExample:
    """image float32 [side, side]: 1 is white, 0 black. label: 1 if the arrow points at the disc. scene: what was drawn."""

    image: np.ndarray
    label: int
    scene: Scene


def draw_scene(rng: np.random.Generator, canvas: Canvas) -> tuple[Scene, int]:
    """A scene and its label, from the generator's numbers in the order of the published code."""
    points = rng.uniform() < 0.5
    shaft, width = int(rng.uniform(*canvas.shaft)), int(rng.uniform(*canvas.width))
    size = canvas.side - 2 * canvas.padding
    ax, ay = size * rng.random(), size * rng.random()
    radius = canvas.radius[0] + (canvas.radius[1] - canvas.radius[0]) * rng.random()
    if size <= 4 * radius:
        raise UsageError(f"side is {canvas.side}; padding {canvas.padding} and radius {canvas.radius} need more.")

    def beyond(start: float) -> float:
        at = start + 2 * radius + (size - 4 * radius) * rng.random()
        return at - size if at > size else at

    cx, cy = beyond(ax), beyond(ay)
    aim = radius / FACTOR if points else radius * FACTOR
    half = math.asin(aim / math.hypot(cx - ax, cy - ay))  # half of the angle under which the arrow sees a disc of radius `aim`
    toward = math.atan2(cy - ay, cx - ax)
    spread = rng.random()
    angle = toward - half + 2 * half * spread if points else toward + half + (2 * math.pi - 2 * half) * spread
    pad = canvas.padding
    return Scene((ax + pad, ay + pad), angle, shaft, width, (cx + pad, cy + pad), radius), int(points)


def distance(x: np.ndarray, y: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of the points (x, y) to the segment from start to end."""
    dx, dy = end - start
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def render(scene: Scene, side: int) -> np.ndarray:
    """The picture, float32 [side, side], black on white; the ink of a pixel fades over the one pixel that an edge crosses."""
    y, x = np.mgrid[:side, :side].astype(float)
    ahead = np.array([math.cos(scene.angle), math.sin(scene.angle)])
    tip = np.array(scene.arrow) + scene.shaft // 2 * ahead
    strokes = [distance(x, y, np.array(scene.arrow) - scene.shaft // 2 * ahead, tip)]
    for turn in (-0.5, 0.5):
        barb = scene.shaft // 2.5 * np.array([math.cos(scene.angle + turn), math.sin(scene.angle + turn)])
        strokes.append(distance(x, y, tip - barb, tip))
    outside = np.minimum(np.min(strokes, 0) - scene.width / 2, np.hypot(x - scene.disc[0], y - scene.disc[1]) - scene.radius)
    return np.clip(outside + 0.5, 0, 1).astype(np.float32)


@system("arrow-pointing", kind="benchmark", paper="arXiv:2506.11997", year=2025, name="Arrow pointing extrapolation")
class ArrowPointing(Task):
    """Two objects anywhere in a picture, and whether one points at the other: a long-range relation with a direction."""

    labels = ("0", "1")
    chance = 1 / 2

    def sample(self, seed: int = 0, n: int = 8, version: str = "small", side: int | None = None) -> list[ImageExample]:
        """n pictures; picture i is the same whatever n is.

        version: "small" (64 x 64, radius 4 to 8) or "full" (192 x 192, radius 15 to 30). side: another canvas for objects of the same
        size, for extrapolation (128 and 384). Raises UsageError where the canvas cannot hold the objects.
        """
        if version not in VERSIONS:
            raise unknown("version", version, VERSIONS)
        canvas = VERSIONS[version]
        if side is not None:
            least = canvas.side
            if isinstance(side, bool) or not isinstance(side, int) or side < least:
                raise UsageError(f"side is {side!r}; it must be an integer >= {least}, the side of version {version!r}.")
            canvas = Canvas(side, canvas.padding, canvas.radius, canvas.shaft, canvas.width)
        first = int(np.random.default_rng(seed).integers(1 << 62))
        examples = []
        for i in range(n):
            scene, label = draw_scene(np.random.default_rng(first + i), canvas)
            examples.append(ImageExample(render(scene, canvas.side), label, scene))
        return examples

    def score(self, example: ImageExample, output: int | bool) -> bool:
        """Is the output, 0 or 1, the label?"""
        return int(output) == example.label

    def oracle(self, example: ImageExample) -> int:
        """Does the ray from the arrow's centre meet the disc? From the scene's geometry, not from the pixels."""
        scene = example.scene
        dx, dy = scene.disc[0] - scene.arrow[0], scene.disc[1] - scene.arrow[1]
        ux, uy = math.cos(scene.angle), math.sin(scene.angle)
        return int(dx * ux + dy * uy > 0 and abs(dx * uy - dy * ux) <= scene.radius)
