"""Drawing of the pocket world's item images.

The background is a scene; in front of it is a motif with a colour and a pattern. Position, size and
shades vary from item to item, so that no two images are equal.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image, ImageChops, ImageDraw

SIDE: Final = 64
"""Side of an image, in pixels."""

SCALE: Final = 3
"""Images are drawn this many times larger and then shrunk, for smooth edges."""

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: Final[dict[str, Colour]] = {
    "red": (214, 32, 36),
    "orange": (246, 136, 20),
    "yellow": (250, 226, 50),
    "green": (60, 180, 60),
    "blue": (36, 84, 220),
    "purple": (136, 44, 170),
    "pink": (250, 140, 190),
    "brown": (120, 72, 36),
}
PATTERNS: Final = ("plain", "striped", "dotted", "checkered", "framed", "hollow")
MOTIFS: Final = ("disc", "star", "heart", "crescent", "cross", "triangle", "arrow", "hourglass")
SCENES: Final = ("forest", "beach", "night", "city", "snow", "desert")


def draw_item(
    colour: str, pattern: str, motif: str, scene: str, generator: np.random.Generator
) -> Image.Image:
    """Draw one item.

    Args:
        colour: A key of :data:`COLOURS`, the motif's fill.
        pattern: One of :data:`PATTERNS`, laid over the motif.
        motif: One of :data:`MOTIFS`, the silhouette.
        scene: One of :data:`SCENES`, the background.
        generator: Random generator for position, size and shades.

    Returns:
        An RGB image of :data:`SIDE` x :data:`SIDE` pixels.
    """
    side = SIDE * SCALE
    image = Image.new("RGB", (side, side))
    _SCENE_PAINTERS[scene](ImageDraw.Draw(image), side, generator)
    radius = side * generator.uniform(0.33, 0.38)
    centre = tuple(side / 2 + side * generator.uniform(-0.06, 0.06, 2))
    silhouette = _silhouette(motif, centre, radius, side)
    image.paste((20, 20, 20), mask=_silhouette(motif, centre, radius * 1.12, side))
    image.paste(_shade(COLOURS[colour], generator, 12), mask=silhouette)
    marks = _PATTERN_PAINTERS[pattern](silhouette, side, generator)
    image.paste((250, 250, 250), mask=ImageChops.multiply(marks, silhouette))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _shade(colour: Colour, generator: np.random.Generator, spread: int) -> Colour:
    """Vary a colour by at most ``spread`` of 255 per channel."""
    red, green, blue = (
        int(np.clip(channel + generator.integers(-spread, spread + 1), 0, 255))
        for channel in colour
    )
    return red, green, blue


def _silhouette(motif: str, centre: Point, radius: float, side: int) -> Image.Image:
    """Return the motif's mask: 255 inside, 0 outside."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    x, y = centre

    def spot(dx: float, dy: float, share: float, fill: int = 255) -> None:
        cx, cy, r = x + dx * radius, y + dy * radius, share * radius
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)

    if motif == "disc":
        spot(0, 0, 0.92)
    elif motif == "crescent":
        spot(0, 0, 1.0)
        spot(0.5, 0, 0.8, fill=0)
    else:
        if motif == "heart":
            spot(-0.46, -0.38, 0.5)
            spot(0.46, -0.38, 0.5)
        draw.polygon([(x + dx * radius, y + dy * radius) for dx, dy in _OUTLINES[motif]], fill=255)
    return mask


def _star_outline() -> list[Point]:
    """Return the ten corners of a five-pointed star on the unit circle."""
    return [
        (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
        for k, r in enumerate([1.05, 0.44] * 5)
    ]


def _cross_outline() -> list[Point]:
    """Return the twelve corners of an upright cross."""
    a, b = 0.34, 1.0
    corner = [(a, b), (a, a), (b, a)]
    mirrored = [(x, -y) for x, y in reversed(corner)]
    right = corner + mirrored
    return right + [(-x, -y) for x, y in right]


_OUTLINES: Final[dict[str, list[Point]]] = {
    "star": _star_outline(),
    "cross": _cross_outline(),
    "heart": [(-0.93, -0.2), (-0.46, -0.4), (0.46, -0.4), (0.93, -0.2), (0, 1.0)],
    "triangle": [(0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "arrow": [
        *((-1, -0.32), (0.1, -0.32), (0.1, -0.95), (1, 0)),
        *((0.1, 0.95), (0.1, 0.32), (-1, 0.32)),
    ],
    "hourglass": [(-0.85, -1), (0.85, -1), (0.18, 0), (0.85, 1), (-0.85, 1), (-0.18, 0)],
}


def _paint_nothing(_: Image.Image, side: int, __: np.random.Generator) -> Image.Image:
    return Image.new("L", (side, side))


def _paint_stripes(_: Image.Image, side: int, generator: np.random.Generator) -> Image.Image:
    marks = Image.new("L", (side, side))
    draw = ImageDraw.Draw(marks)
    step = side // 8
    for x in range(int(generator.integers(step)) - side, 2 * side, step):
        draw.line((x, 0, x + side // 2, side), fill=255, width=step // 3)
    return marks


def _paint_dots(_: Image.Image, side: int, generator: np.random.Generator) -> Image.Image:
    marks = Image.new("L", (side, side))
    draw = ImageDraw.Draw(marks)
    step, radius = side // 7, side // 22
    left, top = (int(shift) for shift in generator.integers(step, size=2))
    for row, y in enumerate(range(top - step, side + step, step)):
        for x in range(left - step + (row % 2) * step // 2, side + step, step):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return marks


def _paint_checks(_: Image.Image, side: int, generator: np.random.Generator) -> Image.Image:
    marks = Image.new("L", (side, side))
    draw = ImageDraw.Draw(marks)
    step = side // 8
    left, top = (int(shift) for shift in generator.integers(step, size=2))
    for row, y in enumerate(range(top - step, side, step)):
        for x in range(left - 2 * step + (row % 2) * step, side, 2 * step):
            draw.rectangle((x, y, x + step - 1, y + step - 1), fill=255)
    return marks


def _paint_frame(silhouette: Image.Image, side: int, _: np.random.Generator) -> Image.Image:
    """Return marks for a white rim inside the motif's edge."""
    core = _shrunk(silhouette, side, 0.66)
    return ImageChops.subtract(silhouette, core)


def _paint_core(silhouette: Image.Image, side: int, _: np.random.Generator) -> Image.Image:
    """Return marks for a white inside with a coloured rim."""
    return _shrunk(silhouette, side, 0.62)


def _shrunk(silhouette: Image.Image, side: int, share: float) -> Image.Image:
    """Return a mask shrunk around the centre of its bounding box."""
    left, top, right, bottom = silhouette.getbbox() or (0, 0, side, side)
    width, height = int((right - left) * share), int((bottom - top) * share)
    small = silhouette.crop((left, top, right, bottom)).resize((width, height))
    mask = Image.new("L", (side, side))
    mask.paste(small, ((left + right - width) // 2, (top + bottom - height) // 2))
    return mask


_PATTERN_PAINTERS: Final[
    dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]]
] = {
    "plain": _paint_nothing,
    "striped": _paint_stripes,
    "dotted": _paint_dots,
    "checkered": _paint_checks,
    "framed": _paint_frame,
    "hollow": _paint_core,
}


def _paint_ground(
    draw: ImageDraw.ImageDraw, side: int, sky: Colour, ground: Colour, horizon: float
) -> None:
    draw.rectangle((0, 0, side, side), fill=sky)
    draw.rectangle((0, side * horizon, side, side), fill=ground)


def _paint_forest(draw: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    _paint_ground(draw, side, _shade((150, 190, 160), generator, 8), (40, 84, 50), 0.7)
    for x in np.linspace(0, side, 6) + generator.uniform(-0.04, 0.04) * side:
        top = side * generator.uniform(0.02, 0.2)
        half = side * 0.11
        foot = side * 0.85
        draw.polygon([(x, top), (x + half, foot), (x - half, foot)], fill=(16, 70, 36))


def _paint_beach(draw: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    _paint_ground(draw, side, _shade((150, 215, 245), generator, 8), (236, 212, 150), 0.72)
    draw.rectangle((0, side * 0.42, side, side * 0.72), fill=(30, 150, 190))


def _paint_night(draw: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    draw.rectangle((0, 0, side, side), fill=_shade((16, 18, 52), generator, 6))
    for x, y in generator.uniform(0, side, (40, 2)):
        draw.rectangle((x, y, x + SCALE, y + SCALE), fill=(240, 240, 200))


def _paint_city(draw: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    draw.rectangle((0, 0, side, side), fill=_shade((190, 190, 196), generator, 8))
    for left in range(0, side, side // 6):
        top = side * generator.uniform(0.05, 0.45)
        draw.rectangle((left, top, left + side // 7, side), fill=(84, 86, 96))
        for y in range(int(top) + side // 24, side, side // 12):
            window = (left + side // 24, y, left + side // 12, y + side // 36)
            draw.rectangle(window, fill=(255, 233, 160))


def _paint_snow(draw: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    _paint_ground(draw, side, _shade((196, 214, 236), generator, 8), (246, 248, 252), 0.6)
    for x, y in generator.uniform(0, side, (40, 2)):
        draw.ellipse((x, y, x + 2 * SCALE, y + 2 * SCALE), fill=(255, 255, 255))


def _paint_desert(draw: ImageDraw.ImageDraw, side: int, generator: np.random.Generator) -> None:
    _paint_ground(draw, side, _shade((250, 214, 170), generator, 8), (206, 140, 80), 0.5)
    for shift in generator.uniform(-0.2, 1.0, 2) * side:
        draw.ellipse((shift, side * 0.42, shift + side * 0.6, side * 1.2), fill=(188, 120, 66))


_SCENE_PAINTERS: Final[
    dict[str, Callable[[ImageDraw.ImageDraw, int, np.random.Generator], None]]
] = {
    "forest": _paint_forest,
    "beach": _paint_beach,
    "night": _paint_night,
    "city": _paint_city,
    "snow": _paint_snow,
    "desert": _paint_desert,
}
