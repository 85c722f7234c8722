"""Scenes of the miniature world: known facts, drawn from a seed and painted in numpy.

In: a seed and a split. Out: a `Scene` of facts, and its picture as uint8 pixels of any size.

A scene is one group of equal objects (one to five), or two single objects, one beside or above the other,
on one of eight grounds. `HELD_OUT` pairs of colour and kind occur in the test split only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capfilt.errors import UsageError

Array = NDArray[Any]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (250, 130, 20),
    "yellow": (250, 222, 40),
    "green": (24, 150, 54),
    "blue": (34, 82, 216),
    "purple": (128, 44, 160),
    "pink": (250, 140, 190),
    "brown": (112, 62, 24),
    "white": (248, 248, 248),
    "black": (20, 20, 22),
}
SIZES = ("small", "large")
BACKGROUNDS = ("grass", "sand", "water", "snow", "night", "brick", "wood", "cloth")
RELATIONS = ("left", "right", "above", "below")
SPLITS = ("train", "test")
MAX_COUNT = 5


@dataclass(frozen=True, slots=True)
class Group:
    """One or more equal objects."""

    kind: str
    color: str
    size: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one object is painted: centre and radius in units of the picture's edges, and its group."""

    group: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """The facts of a picture and where its objects are.

    `relation` says how the first group lies to the second ("left": the first is left of the second) and is
    None when there is one group.
    """

    seed: int
    groups: tuple[Group, ...]
    relation: str | None
    background: str
    placements: tuple[Placement, ...]


# --- shapes: signed distance to the outline, in radii, on a grid of -1..1 -----------------------------------


def _polygon(points: list[tuple[float, float]]) -> Callable[[Array, Array], Array]:
    """Signed distance to a polygon given by its corners in order."""
    corners = np.array(points, dtype=np.float32)

    def distance(u: Array, v: Array) -> Array:
        nearest = np.full(u.shape, np.inf, dtype=np.float32)
        inside = np.zeros(u.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            dx, dy = x1 - x0, y1 - y0
            along = np.clip(((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy), 0, 1)
            nearest = np.minimum(nearest, (u - x0 - along * dx) ** 2 + (v - y0 - along * dy) ** 2)
            if dy != 0:
                crosses = ((y0 > v) != (y1 > v)) & (u < dx * (v - y0) / dy + x0)
                inside ^= crosses
        return np.where(inside, -np.sqrt(nearest), np.sqrt(nearest)).astype(np.float32)

    return distance


def _star_points(spikes: int, inner: float) -> list[tuple[float, float]]:
    angles = np.arange(2 * spikes) * np.pi / spikes - np.pi / 2
    radii = np.where(np.arange(2 * spikes) % 2, inner, 1.0)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, radii, strict=True)]


def _disc(u: Array, v: Array, x: float, y: float, radius: float) -> Array:
    return np.hypot(u - x, v - y) - radius


def _rectangle(u: Array, v: Array, x: float, y: float, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(u - x) - half_width, np.abs(v - y) - half_height)


def _heart(u: Array, v: Array) -> Array:
    lobes = np.minimum(_disc(u, v, -0.45, -0.35, 0.5), _disc(u, v, 0.45, -0.35, 0.5))
    return np.minimum(lobes, _polygon([(-0.86, -0.1), (0.86, -0.1), (0.0, 0.95)])(u, v))


def _flower(u: Array, v: Array) -> Array:
    angles = np.arange(5) * 2 * np.pi / 5 - np.pi / 2
    petals = [_disc(u, v, 0.58 * np.cos(a), 0.58 * np.sin(a), 0.38) for a in angles]
    return np.minimum.reduce(petals)


Shape = tuple[Callable[[Array, Array], Array], tuple[tuple[Callable[[Array, Array], Array], str], ...]]

SHAPES: dict[str, Shape] = {
    # kind: (the part in the object's colour, further parts in a fixed tone)
    "ball": (lambda u, v: _disc(u, v, 0, 0, 0.95), ((lambda u, v: _disc(u, v, -0.3, -0.35, 0.22), "light"),)),
    "box": (lambda u, v: _rectangle(u, v, 0, 0, 0.82, 0.82), ((lambda u, v: np.abs(u) - 0.14, "dark"),)),
    "cone": (_polygon([(0, -1), (0.95, 0.85), (-0.95, 0.85)]), ()),
    "cross": (
        lambda u, v: np.minimum(_rectangle(u, v, 0, 0, 0.32, 0.98), _rectangle(u, v, 0, 0, 0.98, 0.32)),
        (),
    ),
    "ring": (lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.26, ()),
    "star": (_polygon(_star_points(5, 0.42)), ()),
    "heart": (_heart, ()),
    "moon": (lambda u, v: np.maximum(_disc(u, v, 0, 0, 0.98), -_disc(u, v, 0.45, -0.1, 0.78)), ()),
    "kite": (
        _polygon([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]),
        ((lambda u, v: np.minimum(np.abs(u), np.abs(v)) - 0.09, "dark"),),
    ),
    "tree": (
        lambda u, v: _disc(u, v, 0, -0.3, 0.68),
        ((lambda u, v: _rectangle(u, v, 0, 0.65, 0.18, 0.35), "trunk"),),
    ),
    "flower": (_flower, ((lambda u, v: _disc(u, v, 0, 0, 0.3), "dark"),)),
    "flag": (
        lambda u, v: _rectangle(u, v, 0.12, -0.42, 0.78, 0.5),
        ((lambda u, v: _rectangle(u, v, -0.74, 0.0, 0.12, 0.98), "pole"),),
    ),
}
KINDS = tuple(SHAPES)
TONES = {"light": (255, 255, 255), "dark": (40, 36, 44), "trunk": (92, 56, 30), "pole": (70, 70, 78)}
INNER_TONES = ("light", "dark")

HELD_OUT = frozenset((color, kind) for i, kind in enumerate(KINDS) for color in [list(COLORS)[(3 * i + 1) % 10]])
"""Pairs of colour and kind that no training scene shows."""


# --- drawing the facts --------------------------------------------------------------------------------------


def draw_scene(seed: int, split: str = "train") -> Scene:
    """Draw the scene of a seed. The same seed gives different scenes in the two splits.

    Raises:
        UsageError: the split is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise UsageError(f"Split is {split!r}; expected one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    layout = rng.choice(["single", "several", "pair"], p=[0.34, 0.3, 0.36])
    background = str(rng.choice(BACKGROUNDS))
    if layout != "pair":
        count = 1 if layout == "single" else int(rng.integers(2, MAX_COUNT + 1))
        group = _draw_group(rng, split, count)
        return Scene(seed, (group,), None, background, _place_group(rng, group))
    first, second = _draw_group(rng, split, 1), _draw_group(rng, split, 1)
    while (first.kind, first.color) == (second.kind, second.color):
        second = _draw_group(rng, split, 1)
    relation = str(rng.choice(RELATIONS))
    return Scene(seed, (first, second), relation, background, _place_pair(rng, first, second, relation))


def _draw_group(rng: np.random.Generator, split: str, count: int) -> Group:
    while True:
        kind, color = str(rng.choice(KINDS)), str(rng.choice(list(COLORS)))
        if split == "test" or (color, kind) not in HELD_OUT:
            return Group(kind, color, str(rng.choice(SIZES)), count)


def _draw_radius(rng: np.random.Generator, size: str) -> float:
    return float(rng.uniform(0.112, 0.125) if size == "small" else rng.uniform(0.18, 0.2))


def _place_group(rng: np.random.Generator, group: Group) -> tuple[Placement, ...]:
    """Cells of a grid for the objects, each moved a little inside its cell."""
    radius = _draw_radius(rng, group.size)
    if group.count == 1:
        x, y = rng.uniform(radius + 0.02, 0.98 - radius, size=2)
        return (Placement(0, float(x), float(y), radius),)
    radius = min(radius, 0.165)
    columns, rows = (2, 2) if group.count <= 4 and rng.random() < 0.5 else (3, 2)
    if rng.random() < 0.5:
        columns, rows = rows, columns
    cells = rng.permutation(columns * rows)[: group.count]
    slack_x, slack_y = max(0.5 / columns - radius, 0.0), max(0.5 / rows - radius, 0.0)
    placements = []
    for cell in sorted(int(c) for c in cells):
        x = (cell % columns + 0.5) / columns + rng.uniform(-slack_x, slack_x) * 0.8
        y = (cell // columns + 0.5) / rows + rng.uniform(-slack_y, slack_y) * 0.8
        placements.append(Placement(0, float(x), float(y), radius))
    return tuple(placements)


def _place_pair(rng: np.random.Generator, first: Group, second: Group, relation: str) -> tuple[Placement, ...]:
    """Two objects apart along one axis, near each other along the other one."""
    radii = (_draw_radius(rng, first.size), _draw_radius(rng, second.size))
    near, far = rng.uniform(0.2, 0.27), rng.uniform(0.73, 0.8)
    across = rng.uniform(0.3, 0.7)
    sideways = np.clip(across + rng.uniform(-0.1, 0.1, size=2), 0.22, 0.78)
    along = (near, far) if relation in ("left", "above") else (far, near)
    placements = []
    for index, radius in enumerate(radii):
        x, y = float(along[index]), float(sideways[index])
        if relation in ("above", "below"):
            x, y = y, x
        placements.append(Placement(index, x, y, radius))
    return tuple(placements)


# --- painting -----------------------------------------------------------------------------------------------


def render(scene: Scene, width_px: int = 64, height_px: int = 64, *, noise: float = 1.0) -> NDArray[np.uint8]:
    """Paint a scene, deterministically from its seed and the size.

    Args:
        width_px, height_px: size of the picture; the scene is stretched to it.
        noise: strength of grain, light and colour shifts; 0 for none.

    Returns:
        (height_px, width_px, 3) uint8 RGB.
    """
    rng = np.random.default_rng([scene.seed, width_px, height_px, 7])
    picture = _paint_background(rng, scene.background, width_px, height_px)
    for placement in scene.placements:
        _paint_object(rng, picture, scene.groups[placement.group], placement, noise)
    if noise:
        light = 1 + noise * rng.uniform(-0.1, 0.1)
        tint = noise * rng.normal(0, 4, size=3)
        grain = noise * rng.normal(0, rng.uniform(2, 7), size=picture.shape)
        picture = picture * light + tint + grain
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def _paint_background(rng: np.random.Generator, background: str, width: int, height: int) -> Array:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width, y / height
    phase = rng.uniform(0, 1, size=4)
    speckle = rng.random((height, width), dtype=np.float32)
    wave = np.sin
    base, pattern = {
        "grass": ((112, 168, 84), 46 * (speckle - 0.5)),
        "sand": ((222, 200, 150), 22 * (speckle - 0.5) + 7 * wave(9 * (x + 2 * y + phase[0]))),
        "water": ((96, 168, 206), 22 * wave(40 * y + 3 * wave(7 * x + 6 * phase[0]) + 6 * phase[1])),
        "snow": ((226, 234, 242), -26.0 * (speckle > 0.93)),
        "night": ((28, 30, 74), 180.0 * (speckle > 0.985)),
        "brick": ((172, 96, 78), 0 * x),
        "wood": ((186, 142, 92), 14 * wave(28 * y + 2 * wave(5 * x + 6 * phase[0]))),
        "cloth": ((206, 206, 214), 0 * x),
    }[background]
    picture = np.asarray(base, dtype=np.float32) + pattern[..., None].astype(np.float32)
    if background == "brick":
        row = np.floor(8 * y + phase[0])
        mortar = ((8 * y + phase[0]) % 1 < 0.16) | ((4 * x + phase[1] + 0.5 * (row % 2)) % 1 < 0.08)
        picture[mortar] = (206, 196, 186)
    if background == "wood":
        picture[((4 * x + phase[1]) % 1) < 0.06] *= 0.7
    if background == "cloth":
        checks = (np.floor(6 * x + phase[0]) + np.floor(6 * y + phase[1])) % 2 == 0
        picture[checks] = (150, 178, 176)
    return picture


def _paint_object(rng: np.random.Generator, picture: Array, group: Group, placement: Placement, noise: float) -> None:
    """Blend one object into the picture, in place, inside its own window only."""
    height, width = picture.shape[:2]
    reach_x, reach_y = 1.15 * placement.radius * width + 1, 1.15 * placement.radius * height + 1
    left, right = int(max(placement.x * width - reach_x, 0)), int(min(placement.x * width + reach_x + 1, width))
    top, bottom = int(max(placement.y * height - reach_y, 0)), int(min(placement.y * height + reach_y + 1, height))
    v, u = np.mgrid[top:bottom, left:right].astype(np.float32) + 0.5
    u = (u / width - placement.x) / placement.radius
    v = (v / height - placement.y) / placement.radius
    edge_px = placement.radius * min(width, height)
    color = np.array(COLORS[group.color], dtype=np.float32) + noise * rng.normal(0, 7, size=3)
    outline = np.float32(225) if group.color == "black" else np.float32(30)
    window = picture[top:bottom, left:right]
    body, parts = SHAPES[group.kind]
    distance = body(u, v)
    layers = [(distance - 0.07, np.full(3, outline)), (distance, color)]
    for part, tone in parts:
        part_distance = part(u, v)
        if tone in INNER_TONES:
            part_distance = np.maximum(part_distance, distance + 0.05)
        shade = (205, 205, 205) if (tone == "dark" and group.color == "black") else TONES[tone]
        layers.append((part_distance, np.array(shade, dtype=np.float32)))
    for layer_distance, tone_rgb in layers:
        alpha = np.clip(0.5 - layer_distance * edge_px, 0, 1)[..., None]
        window[:] = window * (1 - alpha) + tone_rgb * alpha
