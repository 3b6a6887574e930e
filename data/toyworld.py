"""Toy world: deterministic cartoon people in scenes, with captions, masks and identities.

Every picture is a pure function of a seed. Shapes are drawn with Pillow at `SUPERSAMPLING` times
the output size and box-reduced. All drawing coordinates are in units of a 128-pixel canvas; a
person is drawn in units of one hundredth of its body height, feet at y = 0 and the head at
negative y.

Command line (writes the FastComposer dataset layout):

    python -m data.toyworld --output FOLDER --count 1000 --split train --workers 4
"""

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from data.processes import in_processes

SIZE = 128
SUPERSAMPLING = 3

Color = tuple[int, ...]
Point = tuple[float, float]

# ---------------------------------------------------------------------------------------------
# Content tables
# ---------------------------------------------------------------------------------------------

SKIN = {"pale": (255, 228, 210), "fair": (248, 200, 160), "tan": (218, 156, 102),
        "brown": (160, 100, 62), "dark": (106, 66, 48)}
HAIR = {"black": (36, 32, 44), "brown": (116, 68, 38), "blond": (250, 210, 96),
        "red": (226, 88, 28), "gray": (180, 185, 196), "pink": (252, 122, 180),
        "blue": (58, 112, 230)}
SHIRT = {"red": (228, 54, 60), "orange": (250, 140, 34), "yellow": (254, 214, 62),
         "green": (48, 168, 88), "teal": (40, 190, 196), "blue": (46, 96, 216),
         "purple": (140, 72, 196), "white": (250, 250, 246)}
BOTTOM = {"blue": (56, 84, 156), "black": (46, 44, 56), "beige": (214, 186, 140),
          "gray": (140, 146, 158), "red": (176, 44, 58)}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "skin": tuple(SKIN),
    "hair_color": tuple(HAIR),
    "hair_style": ("short", "long", "bun", "curly", "spiky", "ponytail"),
    "glasses": ("no", "yes"),
    "beard": ("no", "yes"),
    "shirt_color": tuple(SHIRT),
    "pattern": ("plain", "stripes", "dots"),
    "bottom": ("trousers", "skirt"),
    "bottom_color": tuple(BOTTOM),
}
COLOR_ATTRIBUTES = frozenset({"skin", "hair_color", "shirt_color", "bottom_color"})


@dataclass(frozen=True)
class NounTraits:
    """Everything that a noun decides: body shape and which attribute classes it can have."""

    generic: str
    scale: float  # body height relative to an adult
    head: float  # head size relative to the body
    shoulders: float  # half width in body units
    hair_weights: tuple[float, ...]  # in the order of ATTRIBUTES["hair_style"]
    beard_probability: float
    skirt_probability: float
    lashes: bool


TRAITS = {
    "man": NounTraits("person", 1.0, 1.0, 12.5, (4, 1, 1, 2, 3, 1), 0.5, 0.0, False),
    "woman": NounTraits("person", 0.97, 1.0, 10.5, (1, 3, 2, 2, 1, 3), 0.0, 0.5, True),
    "boy": NounTraits("kid", 0.77, 1.16, 11.5, (4, 1, 1, 2, 3, 1), 0.0, 0.0, False),
    "girl": NounTraits("kid", 0.75, 1.16, 10.5, (1, 3, 2, 2, 1, 3), 0.0, 0.5, True),
}
NOUNS = tuple(TRAITS)

ONE_PERSON = ("standing", "waving", "riding a bike", "sitting on a sofa", "reading a book",
              "holding a bouquet of roses", "drinking boba", "running", "dressed as a cowboy",
              "wearing a space suit", "dressed as a race car driver")
TWO_PERSON = ("standing", "waving", "sitting on a sofa", "reading a book", "shaking hands",
              "dancing", "holding a bouquet of roses", "running")
ACTIVITIES = tuple(dict.fromkeys(ONE_PERSON + TWO_PERSON))
CONTEXTS = ("on the beach", "in Paris", "on a mountain", "in a park", "in a lavender farm",
            "in a laboratory", "on Mars", "in a night market", "in the snow", "in the wild west")

# One pair per context is never drawn for training (10 of 130 pairs).
HELD_OUT = frozenset({
    ("reading a book", "on the beach"), ("dressed as a race car driver", "in Paris"),
    ("waving", "on a mountain"), ("wearing a space suit", "in a park"),
    ("riding a bike", "in a lavender farm"), ("drinking boba", "in a laboratory"),
    ("dressed as a cowboy", "on Mars"), ("dancing", "in a night market"),
    ("holding a bouquet of roses", "in the snow"), ("sitting on a sofa", "in the wild west"),
})

STYLE_TEMPLATES = {"": ("", ""), "pencil drawing": ("a pencil drawing of ", ""),
                   "black and white photo": ("a black and white photo of ", ""),
                   "night": ("", " at night")}
STYLES = tuple(STYLE_TEMPLATES)

SUIT = {"shirt_color", "pattern", "bottom", "bottom_color"}
HIDDEN_BY_ACTIVITY = {
    "reading a book": {"pattern"}, "holding a bouquet of roses": {"pattern"},
    "drinking boba": {"pattern"}, "dressed as a cowboy": {"pattern", "hair_style"},
    "wearing a space suit": SUIT, "dressed as a race car driver": SUIT,
}
HIDDEN_BY_STYLE = {"pencil drawing": COLOR_ATTRIBUTES, "black and white photo": COLOR_ATTRIBUTES}

HAIR_PHRASES = {"short": "short {}hair", "long": "long {}hair", "bun": "{}hair in a bun",
                "curly": "curly {}hair", "spiky": "spiky {}hair",
                "ponytail": "{}hair in a ponytail"}
PATTERN_WORDS = {"plain": "plain", "stripes": "striped", "dots": "dotted"}

# The split is part of the random key, so train and test scenes never share a random stream.
SPLIT_KEYS = {"train": 0, "test": 1, "composed": 2}
GENERIC_PROBABILITY = 0.15
ATTRIBUTE_CAPTION_PROBABILITY = 0.19
STYLE_CAPTION_PROBABILITY = 0.06


@dataclass(frozen=True)
class Identity:
    """One person: a noun, the discrete ATTRIBUTES and two continuous body factors."""

    noun: str
    skin: str
    hair_color: str
    hair_style: str
    glasses: str
    beard: str
    shirt_color: str
    pattern: str
    bottom: str
    bottom_color: str
    width: float  # 0.85 to 1.25
    height: float  # 0.92 to 1.06


@dataclass(frozen=True)
class Subject:
    """A person of a scene, with its noun in the caption: `caption[:end]` ends with `noun`."""

    identity: Identity
    noun: str
    end: int
    visible: tuple[str, ...]  # names of the attributes that the picture shows


@dataclass(frozen=True)
class Scene:
    """What a picture shows; subjects run from left to right."""

    seed: int
    split: str
    caption: str
    activity: str
    context: str
    style: str
    subjects: tuple[Subject, ...]


# ---------------------------------------------------------------------------------------------
# Sampling and captions
# ---------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, options: tuple | list, weights: tuple | None = None):
    """One of `options`, uniformly or in proportion to `weights`."""
    if weights is None:
        return options[int(rng.integers(len(options)))]
    return options[int(rng.choice(len(options), p=np.array(weights) / sum(weights)))]


def identity_key(identity: Identity) -> str:
    """Stable string of the noun and the discrete attributes."""
    return "-".join([identity.noun, *(getattr(identity, name) for name in ATTRIBUTES)])


def identity_split(identity: Identity) -> str:
    """"test" for a fixed tenth of all discrete identities, "train" for the others."""
    return "test" if zlib.crc32(identity_key(identity).encode()) % 10 == 0 else "train"


def _draw_identity(rng: np.random.Generator, noun: str) -> Identity:
    traits = TRAITS[noun]
    chance = rng.random(3)
    return Identity(
        noun=noun,
        skin=_pick(rng, ATTRIBUTES["skin"]),
        hair_color=_pick(rng, ATTRIBUTES["hair_color"]),
        hair_style=_pick(rng, ATTRIBUTES["hair_style"], traits.hair_weights),
        glasses="yes" if chance[0] < 0.4 else "no",
        beard="yes" if chance[1] < traits.beard_probability else "no",
        shirt_color=_pick(rng, ATTRIBUTES["shirt_color"]),
        pattern=_pick(rng, ATTRIBUTES["pattern"]),
        bottom="skirt" if chance[2] < traits.skirt_probability else "trousers",
        bottom_color=_pick(rng, ATTRIBUTES["bottom_color"]),
        width=round(float(rng.uniform(0.85, 1.25)), 3),
        height=round(float(rng.uniform(0.92, 1.06)), 3),
    )


def sample_identity(
    rng: np.random.Generator, split: str = "train", noun: str | None = None
) -> Identity:
    """Draw an identity that belongs to `split` ("train" or "test")."""
    noun = noun or _pick(rng, NOUNS)
    while True:
        identity = _draw_identity(rng, noun)
        if identity_split(identity) == split:
            return identity


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _garment(identity: Identity) -> str:
    words = f"{identity.bottom_color} {identity.bottom}"
    return _article(words) if identity.bottom == "skirt" else words


def describe(identity: Identity) -> str:
    """All attributes of an identity in one fixed sentence template."""
    hair = HAIR_PHRASES[identity.hair_style].format(identity.hair_color + " ")
    traits = [f"{identity.skin} skin", hair]
    traits += ["glasses"] * (identity.glasses == "yes") + ["a beard"] * (identity.beard == "yes")
    shirt = _article(f"{identity.shirt_color} {PATTERN_WORDS[identity.pattern]} shirt")
    return f"a {identity.noun} with {' and '.join(traits)} wearing {shirt} and {_garment(identity)}"


def attribute_labels(identity: Identity) -> dict[str, int]:
    """Class index of every attribute in ATTRIBUTES."""
    return {name: names.index(getattr(identity, name)) for name, names in ATTRIBUTES.items()}


def _attribute_phrase(identity: Identity, name: str) -> tuple[str, str]:
    """(preposition, words) that name one attribute in a caption; empty words: nothing to say."""
    value = getattr(identity, name)
    if name in ("glasses", "beard"):
        words = {"glasses": "glasses", "beard": "a beard"}[name]
        return "with", words if value == "yes" else ""
    return {
        "skin": ("with", f"{value} skin"),
        "hair_color": ("with", f"{value} hair"),
        "hair_style": ("with", HAIR_PHRASES.get(value, "").format("")),
        "shirt_color": ("in", _article(f"{value} shirt")),
        "pattern": ("in", f"a {PATTERN_WORDS.get(value)} shirt"),
        "bottom": ("in", "a skirt" if value == "skirt" else "trousers"),
        "bottom_color": ("in", _garment(identity)),
    }[name]


def _attributes_clause(rng: np.random.Generator, identity: Identity, names: list[str]) -> str:
    """" with red hair and glasses", " in a green shirt", ...: one or two visible attributes."""
    names = [name for name in names if _attribute_phrase(identity, name)[1]]
    chosen = rng.permutation(len(names))[: int(rng.integers(1, 3))]
    phrases = [_attribute_phrase(identity, names[i]) for i in sorted(chosen)]
    clause = ""
    for preposition in ("with", "in"):
        words = [words for where, words in phrases if where == preposition]
        clause += f" {preposition} {' and '.join(words)}" if words else ""
    return clause


def _visible(activity: str, style: str) -> tuple[str, ...]:
    hidden = HIDDEN_BY_ACTIVITY.get(activity, set()) | HIDDEN_BY_STYLE.get(style, set())
    return tuple(name for name in ATTRIBUTES if name not in hidden)


def _build_scene(
    seed: int, split: str, identities: tuple[Identity, ...], nouns: list[str],
    clauses: list[str], activity: str, context: str, style: str,
) -> Scene:
    """Write the caption and collect the subjects; `clauses` follow the nouns."""
    prefix, suffix = STYLE_TEMPLATES[style]
    caption, subjects = prefix, []
    for identity, noun, clause in zip(identities, nouns, clauses, strict=True):
        caption += f"{' and ' if subjects else ''}a {noun}"
        subjects.append(Subject(identity, noun, len(caption), _visible(activity, style)))
        caption += clause
    caption += f" {activity} {context}{suffix}"
    return Scene(seed, split, caption, activity, context, style, tuple(subjects))


def sample_scene(seed: int, split: str = "train") -> Scene:
    """Draw the whole content of a scene from `seed`; `split` is "train" or "test"."""
    rng = np.random.default_rng([seed, SPLIT_KEYS[split]])
    activities = ONE_PERSON if (count := int(rng.integers(1, 3))) == 1 else TWO_PERSON
    pairs = [(activity, context) for activity in activities for context in CONTEXTS
             if split != "train" or (activity, context) not in HELD_OUT]
    activity, context = _pick(rng, pairs)
    identities = tuple(sample_identity(rng, split) for _ in range(count))
    nouns = [TRAITS[person.noun].generic if rng.random() < GENERIC_PROBABILITY else person.noun
             for person in identities]
    clauses, style, kind = [""] * count, "", rng.random()
    if kind < ATTRIBUTE_CAPTION_PROBABILITY:
        who = int(rng.integers(count))
        clauses[who] = _attributes_clause(rng, identities[who], list(_visible(activity, style)))
    elif kind < ATTRIBUTE_CAPTION_PROBABILITY + STYLE_CAPTION_PROBABILITY:
        # A night market is dark already, and a laboratory has no sky.
        indoors = context in ("in a night market", "in a laboratory")
        style = _pick(rng, STYLES[1:3] if indoors else STYLES[1:])
    return _build_scene(seed, split, identities, nouns, clauses, activity, context, style)


def compose_scene(
    seed: int, identities: tuple[Identity, ...] | list[Identity], activity: str, context: str,
    style: str = "",
) -> Scene:
    """A scene with fixed content and a plain caption; only the layout is drawn from `seed`."""
    allowed = ONE_PERSON if len(identities) == 1 else TWO_PERSON
    if len(identities) not in (1, 2) or activity not in allowed:
        raise ValueError(f"{len(identities)} people cannot be {activity!r}; choose from {allowed}")
    nouns, clauses = [person.noun for person in identities], [""] * len(identities)
    return _build_scene(
        seed, "composed", tuple(identities), nouns, clauses, activity, context, style)


def vocabulary() -> list[str]:
    """Sorted unique lowercase words that a caption or a description can contain."""
    person = _draw_identity(np.random.default_rng(0), "man")
    texts = ["a an and wearing with in skin", *NOUNS, *ACTIVITIES, *CONTEXTS]
    texts += PATTERN_WORDS.values()
    texts += [traits.generic for traits in TRAITS.values()]
    texts += [prefix + suffix for prefix, suffix in STYLE_TEMPLATES.values()]
    for name, values in ATTRIBUTES.items():
        texts += [_attribute_phrase(replace(person, **{name: value}), name)[1] for value in values]
    return sorted({word for text in texts for word in text.lower().split()})


# ---------------------------------------------------------------------------------------------
# Drawing primitives
# ---------------------------------------------------------------------------------------------


def _shade(color: Color, factor: float) -> Color:
    """Darker (factor < 1) or lighter, towards white (factor > 1)."""
    if factor <= 1:
        return tuple(int(c * factor) for c in color)
    return tuple(int(c + (255 - c) * (factor - 1)) for c in color)


@dataclass(frozen=True)
class Pen:
    """Draws shapes in a scaled, optionally mirrored frame, on a picture and its owner map.

    The owner map holds, per supersampled pixel, the label of the topmost opaque shape; reduced
    to the output size it gives each person's visible alpha exactly. Translucent colors (RGBA)
    tint the picture and leave the owner map alone.
    """

    image: Image.Image
    draw: ImageDraw.ImageDraw
    owners: ImageDraw.ImageDraw
    zoom: float  # supersampled pixels per canvas unit
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    flip: int = 1
    label: int = 0

    def at(self, x: float, y: float, scale: float = 1.0, flip: int = 1) -> "Pen":
        """A pen whose origin is at (x, y) of this pen's frame."""
        return replace(self, x=self.x + self.flip * self.scale * x, y=self.y + self.scale * y,
                       scale=self.scale * scale, flip=self.flip * flip)

    def inverse(self, x: float, y: float) -> Point:
        """Canvas coordinates to this pen's frame."""
        return self.flip * (x - self.x) / self.scale, (y - self.y) / self.scale

    def _map(self, points: list[Point]) -> list[Point]:
        k, z = self.scale * self.zoom, self.zoom
        return [(self.x * z + self.flip * k * x, self.y * z + k * y) for x, y in points]

    def _each(self, color: Color) -> list[tuple[ImageDraw.ImageDraw, Color | int]]:
        """The surfaces that a shape of this color goes on, each with its fill."""
        if len(color) == 4:
            return [(self.draw, color)]
        return [(self.draw, color), (self.owners, self.label)]

    def _box(self, cx: float, cy: float, rx: float, ry: float) -> list[float]:
        ((x, y),), k = self._map([(cx, cy)]), self.scale * self.zoom
        return [x - rx * k, y - ry * k, x + rx * k, y + ry * k]

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, color: Color) -> None:
        """Filled ellipse with center (cx, cy) and radii rx, ry."""
        for surface, fill in self._each(color):
            surface.ellipse(self._box(cx, cy, rx, ry), fill=fill)

    def ring(self, cx: float, cy: float, r: float, width: float, color: Color) -> None:
        """Circle outline with outer radius r."""
        line = max(1, round(width * self.scale * self.zoom))
        for surface, fill in self._each(color):
            surface.ellipse(self._box(cx, cy, r, r), outline=fill, width=line)

    def chord(self, cx: float, cy: float, rx: float, ry: float, start: float, end: float,
              color: Color) -> None:
        """Ellipse segment between two angles in degrees, clockwise from the right."""
        if self.flip < 0:
            start, end = 180 - end, 180 - start
        for surface, fill in self._each(color):
            surface.chord(self._box(cx, cy, rx, ry), start, end, fill=fill)

    def arc(self, cx: float, cy: float, rx: float, ry: float, start: float, end: float,
            width: float, color: Color) -> None:
        """Thick ellipse arc between two angles in degrees."""
        if self.flip < 0:
            start, end = 180 - end, 180 - start
        line = max(1, round(width * self.scale * self.zoom))
        for surface, fill in self._each(color):
            surface.arc(self._box(cx, cy, rx, ry), start, end, fill=fill, width=line)

    def polygon(self, points: list[Point], color: Color) -> None:
        """Filled polygon."""
        for surface, fill in self._each(color):
            surface.polygon(self._map(points), fill=fill)

    def rect(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        """Filled rectangle."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    def limb(self, points: list[Point], width: float, color: Color) -> None:
        """Thick polyline with round joints and ends."""
        mapped = self._map(points)
        line = max(1, round(width * self.scale * self.zoom))
        r = line / 2
        for surface, fill in self._each(color):
            surface.line(mapped, fill=fill, width=line)
            for x, y in mapped:
                surface.ellipse([x - r, y - r, x + r, y + r], fill=fill)

    def blob(self, points: list[Point], radius: float, color: Color) -> None:
        """Polygon grown by `radius`, which rounds its corners."""
        self.polygon(points, color)
        self.limb([*points, points[0]], 2 * radius, color)

    def sky(self, *colors: Color) -> None:
        """Fill the whole picture with a vertical gradient."""
        column = Image.new("RGB", (1, len(colors)))
        column.putdata(colors)
        self.image.paste(column.resize(self.image.size, Image.Resampling.BICUBIC))

    def band(self, top: float, upper: Color, lower: Color) -> None:
        """Vertical gradient from y = top to the bottom of the canvas."""
        y, (width, height) = round(top * self.zoom), self.image.size
        column = Image.new("RGB", (1, 2))
        column.putdata([upper, lower])
        self.image.paste(column.resize((width, height - y), Image.Resampling.BICUBIC), (0, y))

    def glow(self, x: float, y: float, r: float, color: Color, strength: int = 26) -> None:
        """Soft light: a few translucent discs."""
        for factor in (1.0, 0.75, 0.5):
            self.ellipse(x, y, r * factor, r * factor, (*color, strength))


# ---------------------------------------------------------------------------------------------
# Contexts: each paints the whole canvas
# ---------------------------------------------------------------------------------------------


def _side(rng: np.random.Generator) -> int:
    return -1 if rng.random() < 0.5 else 1


def _cloud(pen: Pen, x: float, y: float, r: float, white: Color = (255, 255, 255)) -> None:
    pen.limb([(x - 1.6 * r, y), (x + 1.6 * r, y)], r, white)
    pen.ellipse(x - 0.6 * r, y - 0.4 * r, r * 0.8, r * 0.8, white)
    pen.ellipse(x + 0.5 * r, y - 0.3 * r, r * 0.65, r * 0.6, white)


def _pine(pen: Pen, x: float, y: float, h: float, color: Color, snow: bool = False) -> None:
    pen.rect(x - 0.05 * h, y - 0.2 * h, x + 0.05 * h, y, (104, 72, 56))
    for level, half in ((0.15, 0.3), (0.4, 0.24), (0.65, 0.17)):
        top = y - h * (level + 0.38)
        pen.polygon([(x - half * h, y - level * h), (x, top), (x + half * h, y - level * h)], color)
        pen.polygon([(x + 0.06 * h, y - level * h), (x, top), (x + half * h, y - level * h)],
                    _shade(color, 0.85))
        if snow:
            pen.polygon([(x - half * h * 0.5, y - h * (level + 0.19)), (x, top),
                         (x + half * h * 0.5, y - h * (level + 0.19))], (246, 250, 255))


def _tree(pen: Pen, x: float, y: float, h: float, color: Color) -> None:
    pen.limb([(x, y), (x, y - 0.55 * h)], 0.1 * h, (126, 84, 58))
    pen.ellipse(x, y - 0.68 * h, 0.34 * h, 0.34 * h, color)
    pen.ellipse(x - 0.2 * h, y - 0.55 * h, 0.22 * h, 0.2 * h, color)
    pen.ellipse(x + 0.22 * h, y - 0.56 * h, 0.22 * h, 0.2 * h, _shade(color, 0.92))
    pen.ellipse(x - 0.1 * h, y - 0.8 * h, 0.15 * h, 0.13 * h, _shade(color, 1.18))


def _beach(pen: Pen, rng: np.random.Generator) -> None:
    sea, side = rng.uniform(54, 64), _side(rng)
    pen.sky((96, 190, 246), (178, 226, 252), (236, 248, 250))
    pen.glow(64 - 40 * side, 20, 20, (255, 246, 190), 60)
    pen.ellipse(64 - 40 * side, 20, 9, 9, (255, 226, 104))
    _cloud(pen, 64 + 20 * side, rng.uniform(14, 26), 6)
    _cloud(pen, 64 - 10 * side, rng.uniform(34, 44), 4)
    pen.band(sea, (24, 132, 200), (72, 208, 214))
    for _ in range(5):
        x, y = rng.uniform(0, 128), rng.uniform(sea + 4, sea + 18)
        pen.limb([(x - 7, y), (x + 7, y)], 1.4, (140, 226, 236))
    pen.ellipse(64, 150, 130, 66, (248, 250, 246))
    pen.ellipse(64, 154, 130, 67, (246, 218, 160))
    pen.ellipse(64, 166, 130, 66, (250, 226, 172))
    x = 64 + side * rng.uniform(46, 56)
    trunk = [(x, 102), (x - 2 * side, 76), (x - 5 * side, 52), (x - 10 * side, 30)]
    pen.limb(trunk, 5.5, (158, 108, 66))
    for angle in (200, 160, 235, 305, 340, 20):
        dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        cx, cy = trunk[-1]
        pen.limb([(cx, cy), (cx + 13 * dx, cy + 9 * dy), (cx + 22 * dx, cy + 14 * dy + 7)], 4.6,
                 (42, 158, 92) if angle % 2 else (30, 136, 84))
    umbrella = 64 - side * rng.uniform(44, 54)
    pen.limb([(umbrella, 108), (umbrella, 74)], 2, (250, 250, 250))
    for half, color in ((20, (240, 82, 84)), (12, (255, 250, 244)), (5, (240, 82, 84))):
        pen.chord(umbrella, 80, half, 16, 180, 360, color)


def _paris(pen: Pen, rng: np.random.Generator) -> None:
    x, ground = 64 + _side(rng) * rng.uniform(39, 48), rng.uniform(88, 94)
    pen.sky((142, 178, 236), (246, 200, 214), (255, 226, 196))
    _cloud(pen, rng.uniform(14, 40), 18, 5, (255, 240, 240))
    _cloud(pen, rng.uniform(84, 114), 30, 5, (255, 240, 240))
    for left in range(-6, 128, 19):
        top = ground - rng.uniform(16, 27)
        wall = _pick(rng, ((244, 226, 204), (236, 212, 190), (250, 234, 214)))
        pen.rect(left, top, left + 18.4, ground, wall)
        pen.polygon([(left - 0.5, top), (left + 2.5, top - 6), (left + 16, top - 6),
                     (left + 19, top)], (112, 124, 152))
        for wx in (left + 4, left + 11):
            for wy in (top + 4, top + 13):
                pen.rect(wx, wy, wx + 3.4, wy + 5, (150, 168, 196))
    iron, dark = (132, 92, 78), (108, 72, 64)
    for s in (-1, 1):
        pen.polygon([(x + s * 25, ground), (x + s * 14, ground), (x + s * 7, 62), (x + s * 1, 28),
                     (x, 28), (x, 6), (x + s * 1.6, 6), (x + s * 4.5, 34), (x + s * 13, 66)], iron)
    pen.polygon([(x - 5, 34), (x + 5, 34), (x + 12, 64), (x - 12, 64)], iron)
    pen.polygon([(x - 1.8, 42), (x + 1.8, 42), (x + 4.5, 58), (x - 4.5, 58)], (250, 214, 206))
    pen.rect(x - 15, 61, x + 15, 66, dark)
    pen.rect(x - 7, 35, x + 7, 39, dark)
    pen.arc(x, ground, 16, 22, 180, 360, 3, dark)
    pen.limb([(x, 2), (x, 10)], 1.6, iron)
    for tx in np.arange(4, 128, 13):
        pen.ellipse(tx, ground - 2, 7.5, 6, (96, 162, 96))
        pen.ellipse(tx - 2, ground - 4, 4, 3, (122, 184, 112))
    pen.band(ground, (226, 212, 202), (198, 184, 182))
    pen.polygon([(50, ground), (78, ground), (118, 128), (10, 128)], (238, 226, 214))


def _mountain(pen: Pen, rng: np.random.Generator) -> None:
    pen.sky((92, 164, 236), (170, 212, 248), (226, 240, 250))
    _cloud(pen, rng.uniform(10, 118), 14, 5)
    peaks = [(rng.uniform(-4, 10), 38, 48, (150, 170, 208)),
             (rng.uniform(118, 132), 34, 48, (150, 170, 208)),
             (64 + _side(rng) * rng.uniform(20, 36), 10, 62, (108, 128, 176))]
    for x, top, half, color in peaks:
        base, d = 94, half / 82 * (94 - top) / 60 * 22
        pen.polygon([(x - half, base), (x, top), (x + half, base)], color)
        pen.polygon([(x + 5, base), (x, top), (x + half, base)], _shade(color, 0.84))
        pen.polygon([(x - d, top + 26), (x, top), (x + d, top + 26), (x + 0.45 * d, top + 20),
                     (x + 0.1 * d, top + 28), (x - 0.4 * d, top + 20)], (252, 252, 255))
    _cloud(pen, rng.uniform(10, 118), 54, 6, (240, 246, 252))
    pen.band(90, (118, 190, 92), (70, 150, 76))
    pen.ellipse(24, 104, 66, 20, (126, 196, 96))
    pen.ellipse(116, 106, 60, 20, (104, 180, 88))
    for x in (5, 18, 110, 123):
        _pine(pen, x + rng.uniform(-3, 3), rng.uniform(92, 100), rng.uniform(26, 38), (36, 108, 88))
    pen.ellipse(rng.uniform(8, 24), 122, 9, 5, (148, 150, 162))
    pen.ellipse(rng.uniform(104, 120), 120, 8, 5, (164, 166, 176))


def _park(pen: Pen, rng: np.random.Generator) -> None:
    side = _side(rng)
    pen.sky((122, 200, 250), (196, 232, 252), (240, 248, 236))
    _cloud(pen, rng.uniform(20, 60), 16, 5)
    _cloud(pen, rng.uniform(76, 116), 26, 4)
    for x in range(-4, 140, 16):
        pen.ellipse(x, 78, 13, 12, (132, 200, 130))
    pen.band(80, (146, 214, 98), (92, 180, 80))
    pen.polygon([(64 - side * 4, 80), (64 + side * 6, 80), (64 + side * 40, 128),
                 (64 - side * 34, 128)], (240, 220, 176))
    for x, h in ((rng.uniform(6, 18), 70), (rng.uniform(108, 122), 76)):
        _tree(pen, x, rng.uniform(92, 98), h, _pick(rng, ((58, 158, 84), (74, 172, 82))))
    x = 64 + side * 44
    pen.rect(x - 16, 86, x + 16, 90, (186, 116, 66))
    pen.rect(x - 16, 92, x + 16, 96, (186, 116, 66))
    pen.rect(x - 17, 98, x + 17, 102, (164, 96, 54))
    for s in (-13, 13):
        pen.rect(x + s - 1.5, 86, x + s + 1.5, 110, (84, 78, 88))
    for _ in range(9):
        fx, fy = 64 - side * rng.uniform(28, 62), rng.uniform(104, 126)
        petals = _pick(rng, ((255, 240, 120), (255, 138, 160), (255, 255, 255)))
        pen.ellipse(fx, fy, 2.4, 2.4, petals)
        pen.ellipse(fx, fy, 0.9, 0.9, (240, 160, 60))


def _lavender(pen: Pen, rng: np.random.Generator) -> None:
    horizon, side = rng.uniform(66, 74), _side(rng)
    pen.sky((250, 176, 170), (255, 210, 164), (255, 238, 196))
    sun = 64 + side * rng.uniform(26, 44)
    pen.glow(sun, horizon - 16, 24, (255, 244, 196), 60)
    pen.ellipse(sun, horizon - 16, 11, 11, (255, 236, 150))
    pen.ellipse(24, horizon + 6, 60, 18, (176, 150, 198))
    pen.ellipse(108, horizon + 8, 56, 18, (152, 130, 186))
    pen.band(horizon, (126, 178, 98), (84, 140, 78))
    vanish = 64 + rng.uniform(-16, 16)

    def at(y: float, end: float) -> float:
        """x at height y of the row line that reaches x = end at the bottom of the canvas."""
        return vanish + (end - vanish) * (y - horizon + 5) / (133 - horizon)

    for i, end in enumerate(range(-176, 310, 27)):
        color = (150, 88, 206) if i % 2 else (132, 70, 190)
        pen.polygon([(at(horizon, end), horizon), (at(horizon, end + 19), horizon),
                     (at(128, end + 19), 128), (at(128, end), 128)], color)
        for y in (horizon + 3, horizon + 9, horizon + 18, horizon + 30, horizon + 45):
            r = 9.5 * (y - horizon + 5) / (133 - horizon)
            pen.ellipse(at(y, end + 7), y, r, r * 0.8, _shade(color, 1.22))
    x = 64 - side * rng.uniform(38, 50)
    pen.rect(x - 10, horizon - 10, x + 10, horizon + 3, (252, 232, 206))
    pen.polygon([(x - 13, horizon - 10), (x, horizon - 20), (x + 13, horizon - 10)], (206, 98, 76))
    pen.rect(x - 2.5, horizon - 5, x + 2.5, horizon + 3, (150, 98, 84))


def _flask(pen: Pen, x: float, y: float, h: float, color: Color, round_body: bool) -> None:
    glass = (226, 242, 250)
    pen.rect(x - 0.11 * h, y - h, x + 0.11 * h, y - 0.3 * h, glass)
    if round_body:
        pen.ellipse(x, y - 0.34 * h, 0.36 * h, 0.34 * h, glass)
        pen.chord(x, y - 0.34 * h, 0.36 * h, 0.34 * h, -15, 195, color)
    else:
        pen.polygon([(x - 0.11 * h, y - 0.7 * h), (x + 0.11 * h, y - 0.7 * h), (x + 0.38 * h, y),
                     (x - 0.38 * h, y)], glass)
        pen.polygon([(x - 0.22 * h, y - 0.42 * h), (x + 0.22 * h, y - 0.42 * h), (x + 0.38 * h, y),
                     (x - 0.38 * h, y)], color)
    pen.limb([(x - 0.15 * h, y - h), (x + 0.15 * h, y - h)], 0.09 * h, (186, 210, 226))


def _laboratory(pen: Pen, rng: np.random.Generator) -> None:
    liquids = ((255, 92, 122), (72, 206, 132), (255, 186, 52), (82, 142, 252), (186, 96, 236))
    pen.sky((206, 234, 240), (224, 244, 244), (236, 248, 246))
    for x in range(0, 128, 32):
        pen.rect(x, 0, x + 0.8, 84, (194, 224, 232))
    for shelf in (26, 56):
        pen.rect(0, shelf, 128, shelf + 4, (150, 178, 196))
        pen.rect(0, shelf + 4, 128, shelf + 6, (186, 212, 222))
        for x in range(10, 128, 21):
            _flask(pen, x + rng.uniform(-3, 3), shelf, rng.uniform(16, 21), _pick(rng, liquids),
                   rng.random() < 0.5)
    pen.band(98, (178, 196, 214), (148, 168, 192))
    for x in range(-40, 180, 26):
        pen.polygon([(64 + (x - 64) * 0.7, 98), (64 + (x - 64) * 0.7 + 1, 98), (x + 1.5, 128),
                     (x, 128)], (196, 212, 226))
    pen.rect(0, 80, 128, 86, (250, 252, 252))
    pen.rect(0, 86, 128, 104, (112, 160, 184))
    for x in (22, 64, 106):
        pen.rect(x - 17, 89, x + 17, 101, (132, 178, 200))
    side = _side(rng)
    _flask(pen, 64 - side * 52, 80, 22, _pick(rng, liquids), True)
    x = 64 + side * 50
    pen.limb([(x - 8, 79), (x + 8, 79)], 4, (70, 84, 112))
    pen.arc(x, 69, 9, 10, -90, 90, 4, (70, 84, 112))
    pen.limb([(x - 5, 56), (x - 1, 68)], 5, (54, 66, 94))


def _rocket(pen: Pen, x: float, y: float, h: float) -> None:
    red = (232, 72, 72)
    pen.polygon([(x - 0.36 * h, y), (x - 0.16 * h, y - 0.4 * h), (x + 0.16 * h, y - 0.4 * h),
                 (x + 0.36 * h, y), (x, y - 0.14 * h)], red)
    pen.ellipse(x, y - 0.5 * h, 0.2 * h, 0.48 * h, (246, 248, 252))
    pen.chord(x, y - 0.5 * h, 0.2 * h, 0.48 * h, 226, 314, red)
    pen.rect(x - 0.12 * h, y - 0.16 * h, x + 0.12 * h, y - 0.06 * h, (120, 128, 148))
    pen.ellipse(x, y - 0.54 * h, 0.11 * h, 0.11 * h, (92, 104, 140))
    pen.ellipse(x, y - 0.54 * h, 0.075 * h, 0.075 * h, (120, 214, 250))


def _mars(pen: Pen, rng: np.random.Generator) -> None:
    horizon, side = rng.uniform(76, 86), _side(rng)
    pen.sky((46, 26, 66), (150, 62, 78), (244, 138, 86))
    for _ in range(16):
        r = rng.uniform(0.7, 1.3)
        pen.ellipse(rng.uniform(0, 128), rng.uniform(0, 50), r, r, (255, 240, 214))
    planet = 64 - side * rng.uniform(34, 50)
    pen.ellipse(planet, 20, 11, 11, (246, 206, 150))
    pen.ellipse(planet - 3, 17, 7, 7, (255, 224, 178))
    pen.limb([(planet - 17, 24), (planet + 17, 16)], 2.6, (222, 160, 130))
    pen.polygon([(-5, horizon + 4), (12, horizon - 16), (26, horizon - 15), (46, horizon + 4)],
                (172, 70, 56))
    pen.polygon([(80, horizon + 4), (100, horizon - 13), (116, horizon - 20), (140, horizon + 4)],
                (160, 62, 54))
    pen.band(horizon, (226, 102, 58), (168, 58, 42))
    _rocket(pen, 64 + side * rng.uniform(42, 50), horizon + 12, rng.uniform(62, 74))
    for _ in range(5):
        x, y, r = rng.uniform(4, 124), rng.uniform(horizon + 10, 126), rng.uniform(6, 11)
        pen.ellipse(x, y, r, r * 0.38, (150, 52, 40))
        pen.ellipse(x, y + 0.9, r * 0.86, r * 0.26, (188, 72, 48))


def _night_market(pen: Pen, rng: np.random.Generator) -> None:
    pen.sky((22, 20, 62), (52, 34, 98), (108, 54, 112))
    for _ in range(10):
        pen.ellipse(rng.uniform(0, 128), rng.uniform(0, 30), 0.8, 0.8, (255, 246, 214))
    pen.band(96, (84, 58, 96), (54, 38, 74))
    for left in (-12, 32, 76, 120):
        left += rng.uniform(-3, 3)
        color = _pick(rng, ((232, 66, 72), (40, 170, 160), (246, 150, 44), (66, 116, 224)))
        pen.rect(left, 52, left + 40, 88, (255, 196, 96))
        pen.rect(left + 2, 54, left + 38, 70, (255, 222, 142))
        for x in range(4):
            fruit = _pick(rng, ((228, 80, 60), (104, 180, 80), (250, 238, 214), (236, 130, 48)))
            pen.ellipse(left + 6 + 9.5 * x, 77, 4.6, 4.6, fruit)
        pen.rect(left - 1, 80, left + 41, 104, (120, 66, 62))
        pen.rect(left - 1, 80, left + 41, 84, (160, 92, 74))
        for i in range(5):
            stripe = color if i % 2 == 0 else (255, 246, 232)
            x = left - 3 + 9.2 * i
            pen.rect(x, 42, x + 9.2, 54, stripe)
            pen.ellipse(x + 4.6, 54, 4.6, 4, stripe)
    for row, sag in ((10, 7), (24, 6)):
        xs = np.arange(-6, 140, 4.0)
        line = [(float(x), row + sag * math.sin(math.pi * ((x + row) % 64) / 64)) for x in xs]
        pen.limb(line, 0.8, (64, 40, 60))
        for x in np.arange(rng.uniform(4, 16), 128, 21):
            y = row + sag * math.sin(math.pi * ((x + row) % 64) / 64) + 7
            pen.glow(x, y, 12, (255, 160, 70), 34)
            pen.ellipse(x, y, 6.2, 6.6, (246, 78, 52))
            pen.ellipse(x, y, 3, 6.4, (255, 132, 70))
            pen.rect(x - 2.6, y - 7.4, x + 2.6, y - 5.6, (255, 210, 96))
            pen.rect(x - 2.6, y + 5.6, x + 2.6, y + 7.4, (255, 210, 96))
    pen.ellipse(64, 122, 70, 16, (255, 170, 90, 30))


def _snow(pen: Pen, rng: np.random.Generator) -> None:
    horizon, side = rng.uniform(76, 86), _side(rng)
    pen.sky((150, 190, 232), (198, 222, 246), (232, 242, 252))
    pen.polygon([(-20, 92), (26, 46), (70, 92)], (186, 206, 236))
    pen.polygon([(54, 92), (100, 40), (150, 92)], (174, 198, 232))
    for x in np.arange(2, 130, 17):
        _pine(pen, x + rng.uniform(-3, 3), horizon + 6, rng.uniform(28, 44), (52, 122, 116), True)
    pen.band(horizon + 4, (240, 246, 254), (206, 222, 244))
    pen.ellipse(20, horizon + 14, 66, 12, (246, 250, 255))
    pen.ellipse(116, horizon + 15, 62, 12, (234, 242, 252))
    x, y = 64 + side * rng.uniform(46, 52), 112
    pen.ellipse(x, y + 1, 15, 4, (150, 174, 214, 120))
    for cy, r in ((y - 9, 12), (y - 26, 9)):
        pen.ellipse(x + 0.8, cy + 0.8, r, r, (196, 212, 238))
        pen.ellipse(x - 0.6, cy - 0.6, r - 0.8, r - 0.8, (255, 255, 255))
    pen.limb([(x - 7, y - 19), (x + 7, y - 19)], 4, (226, 62, 66))
    pen.polygon([(x, y - 28), (x - side * 9, y - 25.5), (x, y - 24)], (250, 140, 40))
    for s in (-3, 3):
        pen.ellipse(x + s, y - 30, 1.4, 1.4, (40, 40, 54))
    pen.rect(x - 6, y - 46, x + 6, y - 35, (60, 58, 84))
    pen.rect(x - 9, y - 36, x + 9, y - 33.5, (60, 58, 84))
    for _ in range(34):
        r = rng.uniform(0.9, 1.9)
        pen.ellipse(rng.uniform(0, 128), rng.uniform(0, 104), r, r, (255, 255, 255))


def _wild_west(pen: Pen, rng: np.random.Generator) -> None:
    horizon, side = rng.uniform(84, 90), _side(rng)
    pen.sky((92, 188, 214), (250, 222, 160), (255, 200, 120))
    sun = 64 + side * rng.uniform(10, 30)
    pen.glow(sun, 28, 22, (255, 246, 200), 50)
    pen.ellipse(sun, 28, 10, 10, (255, 240, 170))
    for offset, top, half in ((14, 60, 15), (-16, 66, 12), (62, 62, 15)):
        x = 64 + side * offset
        pen.polygon([(x - half - 7, horizon), (x - half, top), (x + half, top),
                     (x + half + 7, horizon)], (214, 106, 66))
        pen.rect(x - half, top, x + half, top + 4, (232, 132, 84))
    pen.band(horizon, (240, 184, 108), (214, 142, 76))
    x = 64 - side * rng.uniform(32, 37)
    pen.rect(x - 26, 34, x + 26, horizon + 10, (164, 98, 60))
    for y in range(40, int(horizon) + 8, 8):
        pen.rect(x - 26, y, x + 26, y + 1.2, (142, 80, 50))
    pen.rect(x - 29, 24, x + 29, 40, (120, 66, 44))
    pen.rect(x - 26, 27, x + 26, 37, (252, 228, 170))
    # Block letters from a 3x5 grid: a font would depend on the installed Pillow features.
    rows = {"S": (7, 4, 7, 1, 7), "A": (7, 5, 7, 5, 5), "L": (4, 4, 4, 4, 7), "O": (7, 5, 5, 5, 7),
            "N": (5, 7, 7, 7, 5)}
    for i, letter in enumerate("SALOON"):
        for row, bits in enumerate(rows[letter]):
            for column in range(3):
                if bits >> (2 - column) & 1:
                    left, top = x - 23.5 + 8 * i + 2.1 * column, 28 + 1.6 * row
                    pen.rect(left, top, left + 2.2, top + 1.7, (142, 46, 34))
    pen.rect(x - 29, 56, x + 29, 60, (190, 122, 76))
    for s in (-25, 25):
        pen.rect(x + s - 1.5, 60, x + s + 1.5, horizon + 10, (110, 62, 42))
    pen.rect(x - 9, 68, x + 9, horizon + 10, (70, 40, 36))
    for s in (-1, 1):
        pen.rect(x + s * 0.6, 73, x + s * 8.5, horizon + 3, (222, 160, 96))
    x, green = 64 + side * rng.uniform(46, 54), (58, 150, 92)
    pen.limb([(x, 112), (x, 62)], 11, green)
    pen.limb([(x, 94), (x - 13, 92), (x - 13, 78)], 7, green)
    pen.limb([(x, 86), (x + 13, 84), (x + 13, 70)], 7, _shade(green, 0.9))
    pen.limb([(x - 2, 108), (x - 2, 64)], 1.6, _shade(green, 1.25))


CONTEXT_PAINTERS: dict[str, Callable[[Pen, np.random.Generator], None]] = {
    "on the beach": _beach, "in Paris": _paris, "on a mountain": _mountain, "in a park": _park,
    "in a lavender farm": _lavender, "in a laboratory": _laboratory, "on Mars": _mars,
    "in a night market": _night_market, "in the snow": _snow, "in the wild west": _wild_west,
}

# ---------------------------------------------------------------------------------------------
# People
# ---------------------------------------------------------------------------------------------

INK = (44, 34, 46)


@dataclass(frozen=True)
class Pose:
    """Joint positions in body units; index 0 is on the left of the person's own frame."""

    hands: tuple[Point, Point] = ((-18, -29), (18, -29))
    feet: tuple[Point, Point] = ((-7, 0), (7, 0))
    knees: tuple[Point, Point] | None = None
    elbows: tuple[Point | None, Point | None] = (None, None)
    hip: Point = (0, -26)
    lean: float = 0.0  # shoulders relative to the hip, to the right
    gaze: float = 0.0  # -1 (left) to 1 (right)
    toes: float = 0.0  # shoes point to the left (-1), the viewer (0) or the right (1)
    seated: bool = False


@dataclass(frozen=True)
class Outfit:
    """Colors and widths of the clothes as drawn."""

    shirt: Color
    sleeve: Color
    forearm: Color
    hand: Color
    thigh: Color
    shin: Color
    shoe: Color
    arm: float = 8.0
    leg: float = 9.5
    bulk: float = 0.0
    pattern: str = "plain"
    skirt: bool = False
    costume: str = ""


def _outfit(person: Identity, costume: str, suit: Color = (236, 240, 246)) -> Outfit:
    """The person's own clothes, or a cowboy, space or race costume."""
    skin, shirt = SKIN[person.skin], SHIRT[person.shirt_color]
    bottom = BOTTOM[person.bottom_color]
    if costume in ("space", "race"):
        sleeve, bulk = _shade(suit, 0.9), 2.0 if costume == "space" else 0.0
        glove = (74, 104, 176) if costume == "space" else (50, 48, 60)
        return Outfit(suit, sleeve, sleeve, glove, suit, suit, glove, 8.5 + 1.5 * bulk,
                      9.5 + 1.5 * bulk, bulk, costume=costume)
    skirt = person.bottom == "skirt"
    shoe = (128, 70, 38) if costume == "cowboy" else (66, 56, 70)
    return Outfit(shirt, _shade(shirt, 0.88), skin, skin, bottom, skin if skirt else bottom, shoe,
                  pattern=person.pattern, skirt=skirt, costume=costume)


def _leg(pen: Pen, wear: Outfit, pose: Pose, side: int, joint: Point, dim: float = 1.0) -> None:
    """One leg: thigh, shin and shoe; `dim` darkens a far leg."""
    foot = pose.feet[side]
    knee = pose.knees[side] if pose.knees else ((joint[0] + foot[0]) / 2, (joint[1] + foot[1]) / 2)
    ankle = (foot[0], foot[1] - 4)
    pen.limb([knee, ankle], wear.leg * 0.92, _shade(wear.shin, dim * 0.97))
    thigh = wear.leg + 2 if wear.skirt and pose.seated else wear.leg
    bare = wear.skirt and not pose.seated
    pen.limb([joint, knee], thigh, _shade(wear.shin if bare else wear.thigh, dim))
    shoe = _shade(wear.shoe, dim)
    toe = pose.toes * 3.5 if pose.toes else (-1.2, 1.2)[side]
    if wear.costume in ("cowboy", "space"):
        pen.limb([(foot[0], foot[1] - 10), ankle], wear.leg + 1.6, shoe)
    pen.blob([(foot[0] - 3 + toe, foot[1] - 3), (foot[0] + 3 + toe, foot[1] - 3),
              (foot[0] + 3 + toe, foot[1] - 2.4), (foot[0] - 3 + toe, foot[1] - 2.4)], 2.6, shoe)


def _arm(pen: Pen, wear: Outfit, pose: Pose, side: int, shoulder: Point, dim: float = 1.0) -> None:
    """One arm; the elbow bends outwards and down unless the pose says where it is."""
    hand = pose.hands[side]
    middle = ((shoulder[0] + hand[0]) / 2, (shoulder[1] + hand[1]) / 2)
    elbow = pose.elbows[side] or (middle[0] + (-2.5, 2.5)[side], middle[1] + 1.5)
    pen.limb([elbow, hand], wear.arm * 0.8, _shade(wear.forearm, dim))
    pen.limb([shoulder, elbow], wear.arm, _shade(wear.sleeve, dim))
    if wear.costume == "space":
        pen.ellipse(*elbow, wear.arm * 0.5, wear.arm * 0.5, (250, 140, 52))
    pen.ellipse(*hand, wear.arm * 0.56, wear.arm * 0.56, _shade(wear.hand, dim))


def _pattern(pen: Pen, wear: Outfit, corners: tuple[Point, Point, Point, Point]) -> None:
    """Bold stripes or dots inside the torso (corners: shoulders left, right, hips right, left)."""
    light = sum(wear.shirt) > 560
    color = (40, 58, 120) if light else (255, 252, 244)
    (x0, y0), (x1, _), (x2, y2), (x3, _) = corners

    def edge(t: float, u: float) -> Point:
        left, right = x0 + (x3 - x0) * t, x1 + (x2 - x1) * t
        return left + (right - left) * u, y0 + (y2 - y0) * t

    if wear.pattern == "stripes":
        for t in (0.1, 0.44, 0.78):
            low = t + 0.17
            pen.polygon([edge(t, -0.06), edge(t, 1.06), edge(low, 1.06), edge(low, -0.06)], color)
    elif wear.pattern == "dots":
        for t, us in ((0.26, (0.1, 0.5, 0.9)), (0.56, (0.3, 0.7)), (0.86, (0.1, 0.5, 0.9))):
            for u in us:
                pen.ellipse(*edge(t, u), 2.8, 2.8, color)


def _torso(pen: Pen, wear: Outfit, pose: Pose, half: float, width: float) -> None:
    """Shirt with its pattern, shading and the top of the trousers or the skirt."""
    hx, hy = pose.hip
    sx, sy = hx + pose.lean, hy - 26
    waist = (half - 1.5) * 0.5 + 5 * width + wear.bulk
    half = half - 2 + wear.bulk
    corners = ((sx - half, sy + 2), (sx + half, sy + 2), (hx + waist, hy), (hx - waist, hy))
    pen.blob([(hx - waist + 2, hy + 1), (hx + waist - 2, hy + 1), (hx + waist - 2, hy + 3),
              (hx - waist + 2, hy + 3)], 3.5, wear.thigh)
    pen.blob(list(corners), 2.6, wear.shirt)
    _pattern(pen, wear, corners)
    pen.polygon([(sx + half - 3, sy), (sx + half + 2.4, sy), (hx + waist + 2.4, hy + 2),
                 (hx + waist - 3, hy + 2)], (30, 10, 60, 26))
    if wear.skirt and not pose.seated:
        flare = waist + 6
        pen.blob([(hx - waist + 1, hy), (hx + waist - 1, hy), (hx + flare, hy + 14),
                  (hx - flare, hy + 14)], 2, wear.thigh)
        for u in (-0.45, 0.1, 0.6):
            pen.polygon([(hx + u * waist, hy + 2), (hx + u * flare - 1.6, hy + 15.5),
                         (hx + u * flare + 1.6, hy + 15.5)], _shade(wear.thigh, 0.86))


def _cowboy_vest(pen: Pen, pose: Pose, half: float, width: float) -> None:
    hx, hy = pose.hip
    sx, sy, leather = hx + pose.lean, hy - 26, (128, 74, 42)
    for s in (-1, 1):
        pen.blob([(sx + s * (half - 1.5), sy + 1.5), (sx + s * (half - 5), sy + 1.5),
                  (hx + s * 4, hy - 11), (hx + s * 5, hy + 1),
                  (hx + s * (half * 0.5 + 4.5 * width), hy + 1)], 1.6, leather)
    pen.ellipse(sx - half + 4.5, sy + 11, 2.8, 2.8, (255, 214, 72))
    pen.rect(hx - half, hy + 1, hx + half, hy + 4.5, (74, 44, 34))
    pen.ellipse(hx, hy + 2.7, 3.2, 2.8, (255, 210, 80))


def _suit_details(pen: Pen, wear: Outfit, pose: Pose, half: float) -> None:
    hx, hy = pose.hip
    sx, sy = hx + pose.lean, hy - 26
    if wear.costume == "space":
        pen.limb([(sx - half + 1, sy), (sx + half - 1, sy)], 6.5, (168, 182, 208))
        pen.blob([(hx - 7, hy - 16), (hx + 7, hy - 16), (hx + 7, hy - 7), (hx - 7, hy - 7)], 1.5,
                 (92, 112, 150))
        for x, color in ((-5, (246, 76, 70)), (0, (255, 206, 64)), (5, (76, 206, 130))):
            pen.ellipse(hx + x, hy - 11.5, 2.3, 2.3, color)
        pen.limb([(hx - half, hy + 1), (hx + half, hy + 1)], 4, (250, 140, 52))
        return
    pen.limb([(sx - 6, sy), (sx + 6, sy)], 4, (44, 42, 54))
    pen.polygon([(sx - 4.5, sy + 1), (sx + 4.5, sy + 1), (hx + 4.5, hy + 4), (hx - 4.5, hy + 4)],
                (255, 255, 255))
    # A two-column checkered band is the racing sign that survives at low resolution.
    for row in range(6):
        x = hx - 4.5 + 4.5 * (row % 2) + pose.lean * (5 - row) / 6
        pen.rect(x, hy - 22 + 4.4 * row, x + 4.5, hy - 17.6 + 4.4 * row, (36, 34, 44))
    pen.limb([(hx - half, hy + 2), (hx + half, hy + 2)], 3.6, (44, 42, 54))


# Hair, in the head frame: face center at the origin, face radii 18.5 x 17.5.


def _hair_back(pen: Pen, style: str, color: Color) -> None:
    """The part of the hair that lies behind the body and the face."""
    dark = _shade(color, 0.88)
    if style == "long":
        pen.blob([(-15, -10), (15, -10), (18, 28), (-18, 28)], 6.5, dark)
    elif style == "curly":
        for angle in range(0, 360, 30):
            x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            pen.ellipse(20 * x, -5 + 17 * y, 9.5, 9.5, dark)
        pen.ellipse(0, -5, 22, 20, dark)
    elif style == "ponytail":
        pen.limb([(14, -15), (25, -14), (31, -4), (32, 10)], 13, dark)
        pen.limb([(31, 4), (30, 18)], 9, dark)
        pen.limb([(29, 14), (27, 24)], 5, dark)
        pen.ellipse(19, -15, 4.5, 4.5, (255, 214, 92))
    elif style == "bun":
        pen.ellipse(0, -25, 11, 9.5, dark)
        pen.arc(0, -25, 7, 6, 190, 300, 1.8, _shade(color, 1.25))
    pen.ellipse(0, -2, 20.5, 19 if style != "short" else 17.5, dark)


def _cap(pen: Pen, color: Color, angle: float = 200) -> None:
    """Hair on top of the head down to the hairline, with a highlight."""
    pen.chord(0, -1.5, 20.5, 20, angle, 540 - angle, color)


def _hair_front(pen: Pen, style: str, color: Color) -> None:
    """Hairline and fringe over the face."""
    if style == "spiky":
        spikes = [(-21, 2), (-29, -8), (-20, -11), (-27, -24), (-14, -20), (-13, -34), (-2, -22),
                  (5, -37), (10, -22), (22, -31), (19, -15), (30, -16), (21, 2), (18, -7)]
        fringe = [(11, -9), (7, -4), (2, -10), (-4, -4), (-9, -10), (-14, -4), (-18, -7)]
        pen.polygon([*spikes, *fringe], color)
    elif style == "curly":
        for x, y in ((-18, -6), (-12, -12), (-4, -14), (4, -14), (12, -12), (18, -6)):
            pen.ellipse(x, y, 7, 6.5, color)
        _cap(pen, color, 215)
    elif style == "bun":
        _cap(pen, color, 205)
        pen.polygon([(-19.5, -10), (-19.5, 0), (-15, -9)], color)
        pen.polygon([(19.5, -10), (19.5, 0), (15, -9)], color)
    elif style == "long":
        _cap(pen, color, 207)
        for s in (-1, 1):
            pen.blob([(s * 2, -12), (s * 15, -10), (s * 18.5, 20), (s * 19, -10)], 1.6, color)
            pen.limb([(s * 19, -4), (s * 20.5, 26)], 6, color)
    else:  # short and ponytail: a fringe swept to one side
        _cap(pen, color, 203)
        pen.blob([(-18.5, -9), (-17.5, -1), (-14, -7), (-3, -6), (9, -10), (12, -13)], 1.4, color)
        pen.polygon([(19.6, -10), (19.3, 0), (13, -11)], color)
    pen.arc(0, 0, 15.5, 16, 215, 275, 2.6, _shade(color, 1.35))


def _hat(pen: Pen) -> None:
    """Cowboy hat in the head frame."""
    felt, dark = (170, 108, 60), (112, 66, 40)
    pen.blob([(-12, -14), (12, -14), (10, -29), (3, -26), (-3, -26), (-10, -29)], 3, felt)
    pen.limb([(-13, -14), (13, -14)], 5, (196, 48, 48))
    pen.blob([(-29, -15), (-18, -10.5), (18, -10.5), (29, -15), (18, -9), (-18, -9)], 2.4, dark)


def _face(pen: Pen, person: Identity, gaze: float) -> None:
    """Ears, face, beard, eyes, brows, mouth and glasses."""
    skin, hair = SKIN[person.skin], HAIR[person.hair_color]
    lashes = TRAITS[person.noun].lashes
    for s in (-1, 1):
        pen.ellipse(s * 18.5, 3, 3.6, 4.2, _shade(skin, 0.9))
    pen.ellipse(0, 0, 18.5, 17.5, skin)
    pen = pen.at(3.2 * gaze, 0)
    if person.beard == "yes":
        chin = pen.at(-3.2 * gaze, 0)
        chin.chord(0, 1.5, 18.6, 19.5, 20, 160, hair)
        pen.ellipse(0, 8.6, 8.6, 3.2, hair)
    for s in (-1, 1):
        pen.ellipse(s * 11.5, 8, 3.9, 2.7, (250, 90, 96, 88))
        if person.glasses == "yes":
            pen.ellipse(s * 8.2, 2.2, 7, 7, (255, 255, 255, 96))
        pen.ellipse(s * 7.3 + 0.5 * gaze, 2.3, 3.3, 4.1, (255, 252, 248))
        pen.ellipse(s * 7.3 + gaze, 2.4, 2.7, 3.5, INK)
        pen.ellipse(s * 7.3 + gaze - 0.8, 1.1, 1.0, 1.2, (255, 255, 255))
        if lashes:
            pen.arc(s * 7.3, 2.6, 4, 5, *((190, 300) if s < 0 else (240, 350)), 1.5, INK)
            pen.limb([(s * 10.6, 1.2), (s * 12.2, 0.2)], 1.3, INK)
        brow = _shade(hair, 0.7)
        pen.limb([(s * 4.8, -5.4), (s * 7.6, -6.2), (s * 10.2, -5)], 1.2 if lashes else 2, brow)
    mouth = (214, 60, 84) if lashes else (176, 62, 62)
    pen.chord(0, 9, 4.6, 4.6, 0, 180, mouth)
    pen.chord(0, 9, 3.2, 1.6, 0, 180, (255, 255, 255))
    if person.glasses == "yes":
        for s in (-1, 1):
            pen.ring(s * 8.2, 2.2, 7.8, 2.3, (28, 28, 40))
            pen.limb([(s * 15.5, 1.4), (s * 18 - 3.2 * gaze, 0.5)], 2.2, (28, 28, 40))
        pen.limb([(-1.4, 1.4), (1.4, 1.4)], 2.2, (28, 28, 40))


def draw_person(
    pen: Pen, person: Identity, pose: Pose, wear: Outfit,
    between_legs: Callable[[], None] | None = None,
    before_arms: Callable[[], None] | None = None,
) -> None:
    """Draw a person back to front; the callbacks draw props that its limbs reach around."""
    traits = TRAITS[person.noun]
    half = traits.shoulders * person.width
    (hx, hy), hair = pose.hip, HAIR[person.hair_color]
    sx, sy = hx + pose.lean, hy - 26
    head = pen.at(sx + pose.lean * 0.35, sy - 3.5 - 17.5 * traits.head, traits.head)
    if wear.costume == "space":
        pen.blob([(sx - half, sy - 3), (sx + half, sy - 3), (hx + half, hy - 5),
                  (hx - half, hy - 5)], 5.5, (112, 124, 156))
    # A ponytail trails behind in profile and is otherwise on the viewer's right.
    hair_pen = head.at(0, 0, 1, -1) if pose.toes else replace(head, flip=1)
    style = person.hair_style
    if wear.costume == "cowboy" and style not in ("long", "ponytail"):
        style = "short"  # the hat presses everything else flat
    _hair_back(hair_pen, style, hair)
    apart = 5.5 * person.width
    _leg(pen, wear, pose, 0, (hx - apart, hy + 2), 0.84 if between_legs else 1.0)
    if between_legs:
        between_legs()
        _arm(pen, wear, pose, 0, (sx - half + 4, sy + 4), 0.88)
    _leg(pen, wear, pose, 1, (hx + apart, hy + 2))
    pen.limb([(sx, sy), (sx + pose.lean * 0.2, sy - 4)], 8, _shade(SKIN[person.skin], 0.85))
    _torso(pen, wear, pose, half, person.width)
    if wear.costume == "cowboy":
        _cowboy_vest(pen, pose, half, person.width)
        pen.polygon([(sx - 9, sy - 2), (sx + 9, sy - 2), (sx, sy + 8)], (214, 52, 52))
    elif wear.costume:
        _suit_details(pen, wear, pose, half)
    pen.ellipse(sx + pose.lean * 0.2, sy, half * 0.7, 3, (90, 10, 40, 44))
    _face(head, person, pose.gaze)
    _hair_front(hair_pen, style, hair)
    if wear.costume == "cowboy":
        _hat(head)
    if before_arms:
        before_arms()
    for side, s in ((0, -1), (1, 1)):
        if not (between_legs and side == 0):
            _arm(pen, wear, pose, side, (sx + s * (half - 1), sy + 4.5))


# ---------------------------------------------------------------------------------------------
# Props: `pen` has label 0, so they count as background
# ---------------------------------------------------------------------------------------------


def _book(pen: Pen, x: float, y: float, width: float, cover: Color) -> None:
    """Open book seen from the front, centered at (x, y)."""
    w, h = width / 2, width * 0.29
    pen.blob([(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)], 1.6, cover)
    for s in (-1, 1):
        pen.polygon([(x, y - h + 2.5), (x + s * (w - 2), y - h - 1.5), (x + s * (w - 2), y - h + 2),
                     (x, y - h + 5)], (255, 253, 240))
        pen.ellipse(x + s * w * 0.5, y + 1, w * 0.24, w * 0.24, _shade(cover, 1.55))
    pen.limb([(x, y - h + 2), (x, y + h)], 2.4, _shade(cover, 0.72))


def _bouquet(pen: Pen, x: float, y: float, r: float, wrap: Color) -> None:
    """Red roses in a paper cone; (x, y) is the middle of the flowers."""
    tip = y + 1.75 * r
    pen.polygon([(x - r, y), (x + r, y), (x + 0.22 * r, tip), (x - 0.22 * r, tip)], wrap)
    pen.polygon([(x + 0.2 * r, y), (x + r, y), (x + 0.22 * r, y + 1.75 * r)], _shade(wrap, 0.88))
    for angle in range(20, 380, 45):
        pen.ellipse(x + 0.98 * r * math.cos(math.radians(angle)),
                    y + 0.72 * r * math.sin(math.radians(angle)), 0.36 * r, 0.32 * r, (52, 150, 78))
    for dx, dy in ((-0.62, -0.32), (0, -0.55), (0.62, -0.32), (-0.7, 0.28), (0.7, 0.28), (0, 0.12)):
        cx, cy = x + dx * r, y + dy * r
        pen.ellipse(cx, cy, 0.4 * r, 0.38 * r, (222, 34, 62))
        pen.arc(cx, cy, 0.24 * r, 0.22 * r, 150, 400, 0.12 * r, (255, 120, 138))


def _boba(pen: Pen, x: float, y: float, h: float, tea: Color, straw: Color, mouth: Point) -> None:
    """Cup of bubble tea with its bottom center at (x, y) and a straw to `mouth`."""
    w = h * 0.4
    pen.limb([(x, y - h), mouth], 4.2, straw)
    cup = [(x - w, y - h), (x + w, y - h), (x + w * 0.74, y), (x - w * 0.74, y)]
    pen.blob(cup, 1.4, (250, 246, 240))
    pen.polygon([(x - w * 0.95, y - h * 0.84), (x + w * 0.95, y - h * 0.84), (x + w * 0.74, y),
                 (x - w * 0.74, y)], tea)
    for dx, dy in ((-0.45, 0.1), (0, 0.08), (0.45, 0.1), (-0.25, 0.26), (0.25, 0.27), (0.55, 0.3)):
        pen.ellipse(x + dx * w, y - dy * h, w * 0.21, w * 0.21, (52, 30, 34))
    pen.limb([(x - w * 1.1, y - h), (x + w * 1.1, y - h)], 3.2, straw)
    pen.limb([(x - w * 0.6, y - h * 0.74), (x - w * 0.52, y - h * 0.42)], 2.4, (255, 255, 255, 120))


def _bike(pen: Pen, color: Color) -> None:
    """Bicycle heading right, wheels on y = 0, in body units."""
    rear, front, crank, seat, bar = (-25, -15), (25, -15), (-2, -14), (-9, -33), (18, -38)
    for x, y in (rear, front):
        pen.ring(x, y, 15, 3.4, (48, 46, 58))
        pen.ring(x, y, 11.6, 1.2, (190, 196, 208))
        pen.ellipse(x, y, 2.8, 2.8, (190, 196, 208))
    for joints in ((crank, rear, seat, crank), (seat, bar, crank), (front, bar)):
        pen.limb(list(joints), 3.4, color)
    pen.limb([bar, (bar[0] - 1, bar[1] - 7), (bar[0] - 5, bar[1] - 9)], 3, (70, 66, 80))
    pen.limb([(seat[0] - 6, seat[1] - 1), (seat[0] + 5, seat[1] - 1)], 4.6, (70, 50, 50))
    pen.ellipse(*crank, 4.6, 4.6, _shade(color, 0.7))


def _sofa(pen: Pen, x: float, y: float, half: float, seat: float, color: Color) -> None:
    """Back and seat of a sofa standing on y; the arm rests are drawn later, over the people."""
    back = seat + 26
    for s in (-1, 1):
        pen.rect(x + s * (half - 8) - 2, y - 5, x + s * (half - 8) + 2, y + 1, (92, 60, 48))
    pen.blob([(x - half + 6, y - back), (x + half - 6, y - back), (x + half - 6, y - 6),
              (x - half + 6, y - 6)], 5, _shade(color, 0.88))
    pen.blob([(x - half + 6, y - seat), (x + half - 6, y - seat), (x + half - 6, y - 7),
              (x - half + 6, y - 7)], 3, color)
    pen.limb([(x - half + 6, y - seat + 7), (x + half - 6, y - seat + 7)], 1.6, _shade(color, 0.76))
    pen.limb([(x - half + 10, y - seat - 0.5), (x + half - 10, y - seat - 0.5)], 2.4,
             _shade(color, 1.2))


def _sofa_arms(pen: Pen, x: float, y: float, half: float, seat: float, color: Color) -> None:
    for s in (-1, 1):
        pen.limb([(x + s * (half - 4.5), y - 7), (x + s * (half - 4.5), y - seat - 9)], 11,
                 _shade(color, 0.94))
        pen.ellipse(x + s * (half - 4.5), y - seat - 9, 6.4, 6.4, _shade(color, 1.15))


def _race_car(pen: Pen, x: float, y: float, color: Color, flip: int) -> None:
    """Low racing car in profile behind the driver, wheels on y."""
    car = pen.at(x, y, 1.0, flip)
    car.rect(-62, -40, -46, -35, _shade(color, 0.8))
    car.rect(-56, -36, -51, -20, _shade(color, 0.7))
    body = [(-54, -20), (-26, -30), (4, -29), (26, -20), (58, -15), (60, -9), (-54, -9)]
    car.blob(body, 3, color)
    car.blob([(-10, -30), (8, -29), (14, -25), (-12, -25)], 2, (70, 90, 124))
    car.blob([(48, -9), (64, -9), (64, -7), (48, -7)], 2, _shade(color, 0.7))
    car.limb([(-50, -14), (54, -14)], 3.4, (255, 255, 255))
    for wx in (-38, 40):
        car.ellipse(wx, -12, 12.5, 12.5, (44, 42, 52))
        car.ellipse(wx, -12, 6, 6, (206, 212, 222))
    for wx in (-22, 22):
        car.ellipse(wx, -20, 6.8, 6.8, (255, 255, 255))


def _helmet(pen: Pen, x: float, y: float, color: Color) -> None:
    pen.ellipse(x, y, 12.5, 12, color)
    pen.rect(x - 10, y + 4, x + 10, y + 9, _shade(color, 0.85))
    pen.limb([(x - 5, y), (x + 9, y)], 7, (48, 58, 86))
    pen.limb([(x - 3, y - 0.8), (x + 2, y - 0.8)], 2, (150, 200, 240))
    pen.arc(x, y, 11, 10.5, 220, 320, 2.6, (255, 255, 255))


# ---------------------------------------------------------------------------------------------
# Activities: each poses the figures and draws them with their props
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A placed person; `pen` draws in its body units."""

    person: Identity
    pen: Pen


@dataclass(frozen=True)
class Stage:
    """What an activity draws on: canvas pen (label 0), random layout and figures left to right."""

    pen: Pen
    rng: np.random.Generator
    figures: tuple[Figure, ...]

    @property
    def center(self) -> float:
        return sum(figure.pen.x for figure in self.figures) / len(self.figures)

    @property
    def ground(self) -> float:
        return self.figures[0].pen.y

    def prop(self, figure: Figure) -> Pen:
        """The figure's own frame, drawing background."""
        return replace(figure.pen, label=0)


PROP_COLORS = ((226, 62, 70), (44, 118, 214), (250, 168, 40), (36, 160, 130), (150, 80, 200))


def _shadow(stage: Stage, half: float = 20) -> None:
    for figure in stage.figures:
        stage.prop(figure).ellipse(0, -1, half, 4.2, (30, 16, 60, 62))


def _standing_pose(rng: np.random.Generator) -> Pose:
    jitter = rng.uniform(-1, 1, 5)
    left = (-19 - 2 * jitter[0], -28 + jitter[1])
    right = (19 + 2 * jitter[2], -28 - jitter[1])
    pose = Pose(hands=(left, right), lean=0.8 * jitter[3], gaze=0.6 * jitter[4])
    if rng.random() < 0.3:  # one hand on the hip
        pose = replace(pose, hands=((-12, -27), pose.hands[1]), elbows=((-23, -36), None))
    return pose


def _waving_pose(rng: np.random.Generator, side: int) -> Pose:
    pose = _standing_pose(rng)
    sign = (-1, 1)[side]
    hand, elbow = (sign * (29 + rng.uniform(-2, 2)), -70 + rng.uniform(-3, 3)), (sign * 23, -50)
    hands = (hand, (19, -28)) if side == 0 else ((-19, -28), hand)
    elbows = (elbow, None) if side == 0 else (None, elbow)
    return replace(pose, hands=hands, elbows=elbows)


def _standing(stage: Stage) -> None:
    _shadow(stage)
    for figure in stage.figures:
        pose = _standing_pose(stage.rng)
        draw_person(figure.pen, figure.person, pose, _outfit(figure.person, ""))


def _waving(stage: Stage) -> None:
    _shadow(stage)
    for i, figure in enumerate(stage.figures):
        side = i if len(stage.figures) == 2 else int(stage.rng.integers(2))
        pose = _waving_pose(stage.rng, side)
        draw_person(figure.pen, figure.person, pose, _outfit(figure.person, ""))


def _riding(stage: Stage) -> None:
    (figure,), rng = stage.figures, stage.rng
    pen = replace(figure.pen, flip=_side(rng))
    color = _pick(rng, PROP_COLORS)
    stage.prop(figure).ellipse(0, -1, 42, 4, (30, 16, 60, 62))
    down = int(rng.integers(2))
    pedals = ((1, -22), (-1, -4)) if down else ((2, -4), (6, -20))
    pose = Pose(hands=((16, -46), (13, -47)), elbows=((9, -50), (2, -47)), hip=(-9, -36), lean=6,
                feet=pedals, knees=((8, -32), (7, -22)) if down else ((5, -20), (12, -34)),
                gaze=0.8, toes=1, seated=True)
    draw_person(pen, figure.person, pose, _outfit(figure.person, ""),
                between_legs=lambda: _bike(replace(pen, label=0), color))


def _sitting(stage: Stage) -> None:
    color = _pick(stage.rng, ((206, 84, 92), (62, 128, 190), (88, 156, 110), (232, 158, 70),
                              (150, 104, 176)))
    seat = 21 * stage.figures[0].pen.scale if len(stage.figures) == 1 else 19
    half = 44 * stage.figures[0].pen.scale if len(stage.figures) == 1 else 60
    box = (stage.center, stage.ground - 1, min(half, 60), seat, color)
    stage.pen.ellipse(stage.center, stage.ground, box[2] + 2, 4.5, (30, 16, 60, 62))
    _sofa(stage.pen, *box)
    for figure in stage.figures:
        jitter = stage.rng.uniform(-1, 1, 2)
        hip = -(seat + 2) / figure.pen.scale
        pose = Pose(hands=((-11, hip + 1), (11, hip + 1)), hip=(0, hip), lean=jitter[0],
                    elbows=((-17, hip - 11), (17, hip - 11)), gaze=0.6 * jitter[1], seated=True,
                    knees=((-9, hip + 6), (9, hip + 6)), feet=((-9.5, 0), (9.5, 0)))
        draw_person(figure.pen, figure.person, pose, _outfit(figure.person, ""))
    _sofa_arms(stage.pen, *box)


def _holding(stage: Stage, draw: Callable[[Pen, float, float, float], None], grip: Point) -> None:
    """People around a prop; draw(pen, x, y, size), `grip` = hand offset in units of the size."""
    _shadow(stage)
    if len(stage.figures) == 1:
        (figure,) = stage.figures
        size, y = 44.0, -36 + stage.rng.uniform(-1, 1)
        x, dy = grip[0] * size, grip[1] * size
        pose = Pose(hands=((-x, y + dy), (x, y + dy)), gaze=stage.rng.uniform(-0.3, 0.3),
                    elbows=((-22, -36), (22, -36)))
        draw_person(figure.pen, figure.person, pose, _outfit(figure.person, ""),
                    before_arms=lambda: draw(stage.prop(figure), 0, y, size))
        return
    # Two people share one prop between them, below the chin of the shorter one.
    scale = min(figure.pen.scale for figure in stage.figures)
    size = 42.0
    y = stage.ground - 35 * scale
    outfits = [_outfit(figure.person, "") for figure in stage.figures]
    poses = []
    for i, figure in enumerate(stage.figures):
        sign = (-1, 1)[i]
        target = figure.pen.inverse(stage.center + sign * grip[0] * size * 0.9, y + grip[1] * size)
        rest = (sign * 18, -28)
        poses.append(Pose(hands=(rest, target) if i == 0 else (target, rest), gaze=-sign * 0.7))
        draw_person(figure.pen, figure.person, poses[i], outfits[i])
    draw(stage.pen, stage.center, y, size)
    for i, figure in enumerate(stage.figures):  # the inner hands close around the prop
        hand = poses[i].hands[1 - i]
        figure.pen.ellipse(*hand, 4.5, 4.5, outfits[i].hand)


def _reading(stage: Stage) -> None:
    cover = _pick(stage.rng, PROP_COLORS)
    _holding(stage, lambda pen, x, y, size: _book(pen, x, y, size, cover), (0.48, 0.1))


def _flowers(stage: Stage) -> None:
    wrap = _pick(stage.rng, ((250, 238, 214), (196, 226, 250), (252, 208, 222), (236, 214, 250)))

    def draw(pen: Pen, x: float, y: float, size: float) -> None:
        _bouquet(pen, x, y - 0.1 * size, 0.38 * size, wrap)

    _holding(stage, draw, (0.13, 0.36))


def _drinking(stage: Stage) -> None:
    (figure,), rng = stage.figures, stage.rng
    pen = replace(figure.pen, flip=_side(rng))
    tea = _pick(rng, ((222, 166, 112), (246, 170, 190), (166, 204, 128), (190, 160, 226)))
    straw = _pick(rng, PROP_COLORS)
    _shadow(stage)
    pose = Pose(hands=((-13, -32), (13, -32)), elbows=((-23, -37), (23, -37)), gaze=0.3)
    draw_person(pen, figure.person, pose, _outfit(figure.person, ""), before_arms=lambda: _boba(
        replace(pen, label=0), 0, -18, 35, tea, straw, (1, -63)))


def _running(stage: Stage) -> None:
    direction = _side(stage.rng)
    for figure in stage.figures:
        stage.prop(figure).ellipse(0, 0, 24, 4, (30, 16, 60, 62))
        pen, jitter = replace(figure.pen, flip=direction), stage.rng.uniform(-1, 1, 3)
        pose = Pose(hands=((-19 + jitter[0], -40), (22, -50 + jitter[1])),
                    elbows=((-22, -47), (19, -38)), hip=(-1, -28), lean=5 + jitter[2], gaze=0.8,
                    knees=((-10, -14), (13, -22)), feet=((-25, -9), (17, -3)), toes=1)
        draw_person(pen, figure.person, pose, _outfit(figure.person, ""))


def _cowboy(stage: Stage) -> None:
    (figure,) = stage.figures
    _shadow(stage)
    pose = replace(_standing_pose(stage.rng), hands=((-14, -25), (14, -25)),
                   elbows=((-24, -36), (24, -36)), feet=((-9, 0), (9, 0)))
    draw_person(figure.pen, figure.person, pose, _outfit(figure.person, "cowboy"))


def _astronaut(stage: Stage) -> None:
    (figure,), rng = stage.figures, stage.rng
    _shadow(stage)
    pose = _waving_pose(rng, int(rng.integers(2))) if rng.random() < 0.4 else _standing_pose(rng)
    pose = replace(pose, feet=((-9, 0), (9, 0)))
    draw_person(figure.pen, figure.person, pose, _outfit(figure.person, "space"))


def _racer(stage: Stage) -> None:
    (figure,), rng = stage.figures, stage.rng
    color = _pick(rng, ((226, 48, 52), (38, 104, 220), (30, 160, 110)))
    flip = _side(rng)
    stage.pen.ellipse(64, stage.ground - 4, 62, 5, (30, 16, 60, 70))
    _race_car(stage.pen, 64 + rng.uniform(-3, 3), stage.ground - 4, color, flip)
    _shadow(stage)
    pen = replace(figure.pen, flip=flip)
    pose = Pose(hands=((-18, -28), (20, -20)), elbows=(None, (25, -42)), gaze=-0.2)
    wear = _outfit(figure.person, "race", color)
    draw_person(pen, figure.person, pose, wear)
    _helmet(replace(pen, label=0), 21, -27, (255, 206, 62))
    pen.ellipse(25, -16, 4.8, 4.8, wear.hand)


def _shaking(stage: Stage) -> None:
    _shadow(stage)
    y = stage.ground - 33 * sum(figure.pen.scale for figure in stage.figures) / 2
    for i, figure in enumerate(stage.figures):
        sign = (1, -1)[i]
        target = figure.pen.inverse(stage.center - sign * 0.5, y)
        rest = (-sign * 19, -28)
        pose = Pose(hands=(rest, target) if i == 0 else (target, rest), gaze=sign * 0.9,
                    lean=sign * 1.5)
        draw_person(figure.pen, figure.person, pose, _outfit(figure.person, ""))


def _dancing(stage: Stage) -> None:
    _shadow(stage)
    order = (0, 1) if stage.rng.random() < 0.5 else (1, 0)
    if stage.figures[0].person.hair_style == "ponytail":
        order = (0, 1)  # or the ponytail would cover the other face
    y = stage.ground - 36 * min(figure.pen.scale for figure in stage.figures)
    for i in order:
        figure, sign = stage.figures[i], (1, -1)[i]
        pen = replace(figure.pen, flip=sign)  # posed as the left dancer, mirrored for the right
        joined = pen.inverse(stage.center, y)
        raised = (-27 + stage.rng.uniform(-2, 2), -74 + stage.rng.uniform(-3, 3))
        pose = Pose(hands=(raised, joined), elbows=((-23, -52), None), lean=-1.0, gaze=0.8,
                    knees=((-14, -14), (6, -13)), feet=((-25, -8), (5, 0)))
        draw_person(pen, figure.person, pose, _outfit(figure.person, ""))


ACTIVITY_PAINTERS: dict[str, Callable[[Stage], None]] = {
    "standing": _standing, "waving": _waving, "riding a bike": _riding,
    "sitting on a sofa": _sitting, "reading a book": _reading,
    "holding a bouquet of roses": _flowers, "drinking boba": _drinking, "running": _running,
    "dressed as a cowboy": _cowboy, "wearing a space suit": _astronaut,
    "dressed as a race car driver": _racer, "shaking hands": _shaking, "dancing": _dancing,
}

# Half the distance between two people, in canvas units.
SPREAD = {"dancing": 19.5, "sitting on a sofa": 22.0, "reading a book": 23.0,
          "holding a bouquet of roses": 23.0}

# ---------------------------------------------------------------------------------------------
# Rendering
# ---------------------------------------------------------------------------------------------


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
    pen.sky(_shade(tint, 1.3), tint)
    height = SIZE * rng.uniform(0.88, 0.94)
    figure_pen = replace(pen, x=64 + rng.uniform(-4, 4), y=64 + height / 2 + rng.uniform(-2, 2),
                         scale=height / _body_height(identity), label=1)
    figure = Figure(identity, figure_pen)
    (_standing if rng.random() < 0.5 else _waving)(Stage(pen, rng, (figure,)))
    return np.array(pen.image.reduce(SUPERSAMPLING))


# ---------------------------------------------------------------------------------------------
# Dataset folder
# ---------------------------------------------------------------------------------------------

# Image ids are 9 digits; the two splits count from different bases so that they can share a folder.
FIRST_ID = {"train": 100_000_000, "test": 500_000_000}


def _write_sample(seed: int, split: str, output: Path) -> str:
    """Write the .jpg, .json and .npy of one scene and return its id."""
    scene = sample_scene(seed, split)
    picture, masks = render_scene(scene)
    image_id = str(FIRST_ID[split] + seed)
    instances = np.zeros(masks.shape[1:], np.uint8)
    segments, attributes = [], {}
    for number, (subject, mask) in enumerate(zip(scene.subjects, masks, strict=True), start=1):
        if not mask.any():
            continue
        instances[mask] = number
        ys, xs = np.nonzero(mask)
        segments.append({
            "id": number, "word": subject.noun, "start": subject.end - len(subject.noun),
            "end": subject.end, "coco_label": "person", "identity": identity_key(subject.identity),
            "bbox": [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]})
        attributes[str(number)] = {
            name: getattr(subject.identity, name) for name in subject.visible}
    record = {"image_id": image_id, "caption": scene.caption, "segments": segments,
              "activity": scene.activity, "context": scene.context, "style": scene.style,
              "attributes": attributes}
    stem = output / image_id[:5] / image_id
    stem.parent.mkdir(exist_ok=True)
    Image.fromarray(picture).save(stem.with_suffix(".jpg"), quality=95)
    stem.with_suffix(".json").write_text(json.dumps(record))
    np.save(stem.with_suffix(".npy"), instances)
    return image_id


def write_dataset(output: Path, count: int, split: str, workers: int, seed: int) -> None:
    """Write `count` samples; a folder may hold one run of each split."""
    job = partial(_write_sample, split=split, output=output)
    ids = {split: list(in_processes(job, range(seed, seed + count), "rendering", "picture", workers))}
    for name in FIRST_ID:
        path = output / f"image_ids_{name}.txt"
        if name not in ids:
            ids[name] = path.read_text().split() if path.exists() else []
        path.write_text("".join(f"{image_id}\n" for image_id in ids[name]))
    every = ids["train"] + ids["test"]
    (output / "image_ids.txt").write_text("".join(f"{image_id}\n" for image_id in every))


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="toyworld", description="Write a toy world dataset.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER",
                        help="to write into; may hold the other split")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="how many pictures")
    parser.add_argument("--split", choices=tuple(FIRST_ID), default="train",
                        help="whose people: those of training, or held out (default train)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default 0)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count must be at least 1, got {options.count}")
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    if not 0 <= options.seed <= 400_000_000 - options.count:
        parser.error("--seed must be at least 0 and leave room for 9-digit image ids")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "image_ids.txt").touch()
        write_dataset(options.output, options.count, options.split, options.workers, options.seed)
    except OSError as error:
        parser.error(f"cannot write to {options.output}: {error.strerror or error}")


if __name__ == "__main__":
    sys.exit(main())
