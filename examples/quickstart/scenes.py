"""Procedural pictures with masks: everyday scenes, and the endoscopy-like domain to adapt to.

Every scene is drawn by NumPy from one random generator, so that a seed determines a data set. Run
this file to see both domains: ``python examples/quickstart/scenes.py``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SIZE = 256
Array = NDArray[np.float32]


class Scene(NamedTuple):
    """A picture, and the object in it that the prompt asks for."""

    image: NDArray[np.uint8]  # (SIZE, SIZE, 3), RGB
    mask: NDArray[np.bool_]  # (SIZE, SIZE)
    box: Array  # (4,), the prompt: x0 y0 x1 y1 of the mask in pixels


@cache
def grid() -> tuple[Array, Array]:
    """Return the pixel coordinates x and y, each (SIZE, SIZE)."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    return x, y


@cache
def spline_basis(knots: int) -> Array:
    """Return cubic B-spline weights (SIZE, knots + 3), which turn random grids into pictures."""
    t = np.linspace(0, knots, SIZE, endpoint=False)[:, None] - np.arange(-1, knots + 2)
    t = np.abs(t)
    inner = 2 / 3 - t**2 + t**3 / 2
    outer = np.clip(2 - t, 0, None) ** 3 / 6
    return np.where(t < 1, inner, outer).astype(np.float32)


def noise(rng: Generator, knots: int, channels: int = 1) -> Array:
    """Return smooth noise (SIZE, SIZE, channels) of about unit variance on a grid of ``knots``."""
    basis = spline_basis(knots)
    values = rng.standard_normal((channels, knots + 3, knots + 3), dtype=np.float32)
    return np.ascontiguousarray((2 * basis @ values @ basis.T).transpose(1, 2, 0))


def octaves(rng: Generator, *knots: int, channels: int = 1) -> Array:
    """Return a sum of smooth noises, each half as strong as the one before."""
    return sum(noise(rng, k, channels) * 0.5**i for i, k in enumerate(knots))


def grain(rng: Generator, strength: float) -> Array:
    """Return the noise of a camera (SIZE, SIZE, 3)."""
    return strength * rng.standard_normal((SIZE, SIZE, 3), dtype=np.float32)


def smoothstep(x: Array) -> Array:
    """Return the smooth ramp from 0 (x <= 0) to 1 (x >= 1)."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def box_of(mask: NDArray[np.bool_]) -> Array:
    """Return the tight box x0 y0 x1 y1 of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)


def box_fill(mask: NDArray[np.bool_]) -> float:
    """Return the share of its box that a mask fills, which is the IoU of predicting the box."""
    x0, y0, x1, y1 = box_of(mask)
    return float(mask.sum() / ((x1 - x0) * (y1 - y0)))


# --- silhouettes: how far inside the shape a pixel lies, in pixels, negative outside -------------


def local_polar(rng: Generator, stretch: float, bend: float) -> tuple[Array, Array]:
    """Return angle and radius about a random centre, in a rotated, stretched and bent frame."""
    x, y = grid()
    cx, cy = (rng.uniform(0.22 * SIZE, 0.78 * SIZE) for _ in "xy")
    turn = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(turn), math.sin(turn)
    u = (cos * (x - cx) + sin * (y - cy)) / math.sqrt(stretch)
    v = (cos * (y - cy) - sin * (x - cx)) * math.sqrt(stretch)
    v = v + bend * u * u / SIZE
    return np.arctan2(v, u), np.hypot(u, v)


def radial_shape(theta: Array, radius: Array, outline: Array) -> Array:
    """Return the depth inside a shape whose outline is a radius at equally spaced angles."""
    angles = np.linspace(-np.pi, np.pi, len(outline) + 1)
    closed = np.append(outline, outline[0])
    return np.interp(theta, angles, closed).astype(np.float32) - radius


def blob_outline(rng: Generator, size: float, roughness: float) -> Array:
    """Return a smooth random outline, the sum of a few waves."""
    angles = np.linspace(-np.pi, np.pi, 180, endpoint=False)
    waves = np.arange(2, 7)
    strength = rng.normal(0, roughness / waves)
    phase = rng.uniform(0, 2 * np.pi, len(waves))
    return size * np.exp(
        (strength[:, None] * np.cos(np.outer(waves, angles) + phase[:, None])).sum(0)
    )


def polygon_outline(rng: Generator, size: float, star: bool) -> Array:
    """Return the outline of a polygon with uneven corners, or of a star."""
    corners = int(rng.integers(4, 8)) * (2 if star else 1)
    at = (np.arange(corners) + rng.uniform(-0.2, 0.2, corners)) / corners * 2 * np.pi - np.pi
    reach = rng.uniform(0.8, 1.2, corners) * size
    if star:
        reach[::2] *= rng.uniform(0.35, 0.6)
    points = reach * np.exp(1j * at)
    edges = np.concatenate(
        [
            np.linspace(a, b, 24, endpoint=False)
            for a, b in zip(points, np.roll(points, -1), strict=True)
        ]
    )
    angles = np.linspace(-np.pi, np.pi, 240, endpoint=False)
    order = np.argsort(np.angle(edges))
    return np.interp(angles, np.angle(edges)[order], np.abs(edges)[order], period=2 * np.pi)


def everyday_shape(rng: Generator) -> Array:
    """Return the depth map of a random everyday silhouette."""
    size = rng.uniform(0.13, 0.25) * SIZE
    kind = rng.choice(["blob", "polygon", "star", "ellipse", "ring", "crescent"])
    theta, radius = local_polar(rng, stretch=rng.uniform(1, 2.2), bend=rng.uniform(0, 1.5))
    if kind in ("polygon", "star"):
        return radial_shape(theta, radius, polygon_outline(rng, size, star=kind == "star"))
    if kind == "blob":
        return radial_shape(theta, radius, blob_outline(rng, size, roughness=0.5))
    depth = radial_shape(theta, radius, blob_outline(rng, size, roughness=0.1))
    if kind == "ring":  # a hole off the centre
        shift = radius * np.cos(theta - rng.uniform(0, 2 * math.pi))
        return np.minimum(depth, radius - size * rng.uniform(0.25, 0.55) + 0.15 * shift)
    if kind == "crescent":  # a bite from one side
        turn, reach = rng.uniform(0, 2 * math.pi), size * rng.uniform(0.6, 0.9)
        bite = radius * np.exp(1j * (theta - turn)) - reach
        return np.minimum(depth, np.abs(bite) - size * rng.uniform(0.55, 0.8))
    return depth


# --- the source domain ---------------------------------------------------------------------------


def palette(rng: Generator) -> Array:
    """Return a random RGB colour in 0..1, from muted to vivid."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.15, 0.9), rng.uniform(0.3, 0.95)
    wave = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation + saturation * wave)).astype(np.float32)


def surface(rng: Generator) -> Array:
    """Return a textured colour picture (SIZE, SIZE, 3): clouds, stripes, dots, checks or plain."""
    x, y = grid()
    kind = rng.choice(
        ["clouds", "stripes", "dots", "checks", "plain"], p=[0.35, 0.2, 0.1, 0.1, 0.25]
    )
    turn, wave = rng.uniform(0, math.pi), rng.uniform(0.2, 0.7)
    cos, sin = wave * math.cos(turn), wave * math.sin(turn)
    u, v = cos * x + sin * y, cos * y - sin * x
    if kind == "clouds":
        mix = smoothstep(0.5 + 0.4 * octaves(rng, int(rng.integers(4, 16)), 32))
    elif kind == "plain":
        mix = 0.15 * noise(rng, 3)
    elif kind == "stripes":
        mix = smoothstep(0.5 + 1.5 * np.sin(u + 0.6 * noise(rng, 4)[..., 0]))[..., None]
    elif kind == "dots":
        mix = smoothstep(2 * np.sin(u) * np.sin(v))[..., None]
    else:
        mix = smoothstep(0.5 + 4 * np.sin(u) * np.sin(v))[..., None]
    ground, figure = palette(rng), palette(rng)
    figure = ground + rng.uniform(0.3, 0.8) * (figure - ground)
    return ground + mix * (figure - ground)


def everyday_scene(rng: Generator) -> Scene:
    """Draw overlapping objects on a textured ground; the prompt asks for one of them."""
    x, y = grid()
    light = rng.uniform(0, 2 * math.pi)
    lx, ly = math.cos(light), math.sin(light)
    slope = (lx * (x - SIZE / 2) + ly * (y - SIZE / 2))[..., None] / SIZE
    image = surface(rng) * (1 + rng.uniform(0, 0.5) * slope) + 0.06 * octaves(rng, 3, 6, channels=3)

    covers = []
    for _ in range(rng.integers(3, 7)):
        depth = everyday_shape(rng)
        cover = np.clip(depth + 0.5, 0, 1)
        fall = rng.integers(4, 10)
        toward_light = np.ix_(
            *(np.clip(np.arange(SIZE) + round(d * fall), 0, SIZE - 1) for d in (ly, lx))
        )
        shadow = 0.5 * smoothstep(depth[toward_light] / 14 + 0.5)[..., None]
        dome = np.gradient(np.sqrt(np.clip(depth, 0, 30)))
        shade = 1 + rng.uniform(0.3, 1.2) * np.clip(-(lx * dome[1] + ly * dome[0]), -0.4, 0.4)
        skin = surface(rng) * shade[..., None]
        image = image * (1 - shadow)
        image = image + cover[..., None] * (skin - image)
        covers = [c * (cover < 0.5) for c in covers] + [cover >= 0.5]

    image = image + grain(rng, rng.uniform(0.005, 0.03))
    choices = [c for c in covers if c.sum() > 0.02 * SIZE**2 and box_fill(c) > 0.35] or covers[-1:]
    mask = choices[rng.integers(len(choices))]
    return Scene((255 * np.clip(image, 0, 1)).astype(np.uint8), mask, box_of(mask))


# --- the target domain ---------------------------------------------------------------------------


def endoscopy_scene(rng: Generator) -> Scene:
    """Draw a polyp of nearly the colour of the wet mucosa around it."""
    x, y = grid()
    bumps = noise(rng, 36)[..., 0]

    # the wall: folds around the dark end of the tube, and unevenness
    away = np.hypot(x - SIZE * rng.uniform(0.1, 0.9), y - SIZE * rng.uniform(0.1, 0.9)) / SIZE
    warp, firm = noise(rng, 3)[..., 0], smoothstep(0.5 + noise(rng, 3)[..., 0])
    ridges = np.exp(3 * np.cos(rng.uniform(14, 22) * np.sqrt(away + 0.02) + warp) - 3)
    relief = 14 * firm * ridges + 1.5 * octaves(rng, 5, 12)[..., 0]

    # the polyp: a smooth bent dome that rises softly from the wall
    theta, radius = local_polar(rng, stretch=rng.uniform(1.2, 2.6), bend=rng.uniform(0, 2.0))
    outline = blob_outline(rng, rng.uniform(0.13, 0.22) * SIZE, roughness=0.22)
    depth = radial_shape(theta, radius, outline) + 1.2 * noise(rng, 16)[..., 0]
    rim = np.hypot(x - SIZE / 2, y - SIZE / 2) / SIZE
    mask = (depth > 0) & (rim < 0.6)
    cover = smoothstep(depth / rng.uniform(8, 16) + 0.5)
    inward = np.clip(depth / (depth + radius), 0, 1)  # 0 at the outline, 1 at the centre
    height = rng.uniform(10, 22) * (1 - (1 - inward) ** 2) ** 0.8
    relief = relief * (1 - 0.8 * cover) + height + 0.5 * cover * bumps

    # colour: nearly the same inside and outside, vessels mostly outside
    wall = np.array([0.84, 0.45, 0.36], np.float32) + rng.normal(0, 0.04, 3).astype(np.float32)
    tint = rng.normal([0.01, -0.03, -0.02], 0.03).astype(np.float32)
    image = wall + 0.03 * octaves(rng, 4, 10, 24) + 0.015 * octaves(rng, 5, 20, channels=3)
    for knots, width, strength in ((5, 0.05, 0.16), (9, 0.06, 0.12), (16, 0.1, 0.08)):
        vein = np.exp(-((noise(rng, knots) / width) ** 2)) * smoothstep(0.4 + 0.7 * noise(rng, 4))
        ink = np.array([0.5, 1, 0.8], np.float32) * strength
        image = image - ink * vein * (1 - 0.7 * cover[..., None])
    image = image + tint * cover[..., None]

    # light from the tip of the endoscope: shading, distance, wet highlights
    gy, gx = np.gradient(relief)
    lx, ly = rng.uniform(-0.35, 0.35), rng.uniform(-0.35, 0.35)
    facing = (1 - lx * gx - ly * gy) / np.sqrt(1 + gx**2 + gy**2)
    distance = 0.2 + 0.8 * np.maximum(smoothstep(away / 0.4 + 0.1), 0.8 * cover)
    foot = 1 - 0.2 * np.exp(-((depth / 12) ** 2)) * (1 - cover)
    image = image * (np.clip(facing, 0.35, 1.2) * distance * foot)[..., None]
    gy, gx = np.gradient(relief + 0.9 * bumps)
    glint = (1 - 2 * lx * gx - 2 * ly * gy) / np.sqrt(1 + gx**2 + gy**2)
    wet = smoothstep(noise(rng, 6)[..., 0] + 0.2 + 0.4 * cover)
    image = image + (0.8 * wet * distance * smoothstep((glint - 1.1) / 0.1))[..., None]

    # the round field of view
    image = image * ((1.08 - 0.9 * rim**2) * smoothstep((0.64 - rim) / 0.03))[..., None]
    image = image + grain(rng, 0.012)
    return Scene((255 * np.clip(image, 0, 1)).astype(np.uint8), mask, box_of(mask))


DOMAINS: dict[str, Callable[[Generator], Scene]] = {
    "source": everyday_scene,
    "target": endoscopy_scene,
}


def make_scenes(domain: str, count: int, seed: int) -> Scene:
    """Return ``count`` scenes of one domain ("source" or "target"), stacked along a first axis."""
    rng = np.random.default_rng(seed)
    return Scene(*map(np.stack, zip(*(DOMAINS[domain](rng) for _ in range(count)), strict=True)))


def main() -> None:
    """Write a sheet of both domains with the masks outlined."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output/scenes.png")
    args = parser.parse_args()

    import matplotlib.pyplot as plt

    columns = 6
    figure, axes = plt.subplots(4, columns, figsize=(2.4 * columns, 9.8), layout="constrained")
    for rows, domain in ((axes[:2], "source"), (axes[2:], "target")):
        scenes = make_scenes(domain, 2 * columns, args.seed)
        for axis, image, mask in zip(rows.flat, scenes.image, scenes.mask, strict=True):
            axis.imshow(image)
            axis.contour(mask, [0.5], colors="white", linewidths=1)
            axis.set_axis_off()
        rows[0, 0].set_title(f"{domain} domain", loc="left")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
