"""What a scene of the small world shows: who, what they do, where, and the caption that says it."""
import zlib
from dataclasses import dataclass, replace

import numpy as np

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


def pick(rng: np.random.Generator, options: tuple | list, weights: tuple | None = None):
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
        skin=pick(rng, ATTRIBUTES["skin"]),
        hair_color=pick(rng, ATTRIBUTES["hair_color"]),
        hair_style=pick(rng, ATTRIBUTES["hair_style"], traits.hair_weights),
        glasses="yes" if chance[0] < 0.4 else "no",
        beard="yes" if chance[1] < traits.beard_probability else "no",
        shirt_color=pick(rng, ATTRIBUTES["shirt_color"]),
        pattern=pick(rng, ATTRIBUTES["pattern"]),
        bottom="skirt" if chance[2] < traits.skirt_probability else "trousers",
        bottom_color=pick(rng, ATTRIBUTES["bottom_color"]),
        width=round(float(rng.uniform(0.85, 1.25)), 3),
        height=round(float(rng.uniform(0.92, 1.06)), 3),
    )


def check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"people are of the split 'train' or 'test', not {split!r}")


def sample_identity(
    rng: np.random.Generator, split: str = "train", noun: str | None = None
) -> Identity:
    """Draw an identity that belongs to `split`; raises ValueError if that is not "train" or "test"."""
    check_split(split)
    noun = noun or pick(rng, NOUNS)
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
    """Draw the whole content of a scene from `seed`; raises ValueError if `split` is not "train" or
    "test"."""
    check_split(split)
    rng = np.random.default_rng([seed, SPLIT_KEYS[split]])
    activities = ONE_PERSON if (count := int(rng.integers(1, 3))) == 1 else TWO_PERSON
    pairs = [(activity, context) for activity in activities for context in CONTEXTS
             if split != "train" or (activity, context) not in HELD_OUT]
    activity, context = pick(rng, pairs)
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
        style = pick(rng, STYLES[1:3] if indoors else STYLES[1:])
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
