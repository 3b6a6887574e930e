"""A scene or a person of the small world as a picture."""
import zlib
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from toyworld.activities import ACTIVITY_PAINTERS, SPREAD, Figure, Stage
from toyworld.pen import SIZE, SUPERSAMPLING, Pen, shade
from toyworld.places import CONTEXT_PAINTERS
from toyworld.scenes import SPLIT_KEYS, TRAITS, Identity, Scene, identity_key


def _new_pen(size: int) -> tuple[Pen, Image.Image]:
    """A canvas pen and its owner map, both supersampled."""
    side = size * SUPERSAMPLING
    image, owners = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    draw, owner_draw = ImageDraw.Draw(image, "RGBA"), ImageDraw.Draw(owners)
    return Pen(image, draw, owner_draw, side / SIZE), owners


def _body_height(person: Identity) -> float:
    """From the feet to the top of the hair, in body units."""
    hair = {"spiky": 55.0, "bun": 52.5, "curly": 49.5}.get(person.hair_style, 39.5)
    return 55.5 + hair * TRAITS[person.noun].head


def _place(
    pen: Pen, rng: np.random.Generator, people: tuple[Identity, ...], activity: str
) -> tuple[Figure, ...]:
    """Positions and sizes of the people, left to right, feet on a common ground line."""
    ground = float(rng.uniform(119, 124))
    zoom = rng.uniform(1.02, 1.1) if len(people) == 1 else rng.uniform(0.93, 1.0)
    if all(TRAITS[person.noun].generic == "kid" for person in people):
        zoom *= 1.16  # the camera comes closer to children
    if activity == "riding a bike":
        zoom *= 0.93
    spread = SPREAD.get(activity, 24.5) + rng.uniform(-0.8, 0.8)
    middle = 64 + rng.uniform(-5, 5) * (1.0 if len(people) == 1 else 0.5)
    figures = []
    for i, person in enumerate(people):
        traits = TRAITS[person.noun]
        scale = min(zoom * traits.scale * person.height, (ground - 2) / _body_height(person))
        x = middle if len(people) == 1 else middle + (-spread, spread)[i]
        figures.append(Figure(person, replace(pen, x=x, y=ground, scale=scale, label=i + 1)))
    return tuple(figures)


def _pencil(image: Image.Image) -> Image.Image:
    """Dark outlines and faint gray tones on warm paper."""
    gray = image.convert("L")
    blurred = ImageOps.invert(gray).filter(ImageFilter.GaussianBlur(2.2))
    lines = np.asarray(gray, float) / np.maximum(256.0 - np.asarray(blurred, float), 1.0)
    tone = np.minimum(lines, 1.0) ** 1.6 * (0.72 + 0.28 * np.asarray(gray, float) / 255)
    sketch = Image.fromarray((255 * np.clip(tone, 0, 1)).astype(np.uint8))
    return ImageOps.colorize(sketch, (46, 44, 52), (250, 245, 232))


def _black_and_white(image: Image.Image) -> Image.Image:
    return ImageOps.autocontrast(image.convert("L"), cutoff=0.5).convert("RGB")


def _night(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", (red.point(lambda v: v * 0.4), green.point(lambda v: v * 0.46),
                               blue.point(lambda v: 30 + v * 0.62)))


STYLE_FILTERS = {"pencil drawing": _pencil, "black and white photo": _black_and_white,
                 "night": _night}


def render_scene(scene: Scene, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Picture (S, S, 3) uint8 and visible masks (P, S, S) bool of a scene with P people."""
    rng = np.random.default_rng([scene.seed, SPLIT_KEYS[scene.split], 1])
    pen, owners = _new_pen(size)
    CONTEXT_PAINTERS[scene.context](pen, rng)
    people = tuple(subject.identity for subject in scene.subjects)
    stage = Stage(pen, rng, _place(pen, rng, people, scene.activity))
    ACTIVITY_PAINTERS[scene.activity](stage)
    image = pen.image.reduce(SUPERSAMPLING)
    if scene.style:
        image = STYLE_FILTERS[scene.style](image)
    masks = [np.asarray(owners.point(lambda v, label=i + 1: 255 * (v == label))
                        .reduce(SUPERSAMPLING)) > 127 for i in range(len(people))]
    return np.array(image), np.stack(masks)


def render_reference(identity: Identity, seed: int, size: int = SIZE) -> np.ndarray:
    """Picture (S, S, 3) uint8 of one person, standing or waving, on a plain tinted background."""
    rng = np.random.default_rng([seed, zlib.crc32(identity_key(identity).encode()), 2])
    pen, _ = _new_pen(size)
    tint = tuple(int(v) for v in rng.integers(188, 238, 3))
    pen.sky(shade(tint, 1.3), tint)
    height = SIZE * rng.uniform(0.88, 0.94)
    figure_pen = replace(pen, x=64 + rng.uniform(-4, 4), y=64 + height / 2 + rng.uniform(-2, 2),
                         scale=height / _body_height(identity), label=1)
    figure = Figure(identity, figure_pen)
    ACTIVITY_PAINTERS["standing" if rng.random() < 0.5 else "waving"](Stage(pen, rng, (figure,)))
    return np.array(pen.image.reduce(SUPERSAMPLING))
