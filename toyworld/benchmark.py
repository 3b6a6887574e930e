"""The small world's benchmark: its cases, what the classifier reads off their pictures, and the scores.

A case is a function of its number alone: a held-out prompt, a seed, and two sets of subjects whom training
never saw. docs/results.md says what each score means and what it cannot see.
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

import toyworld
from images import pairwise_distance, to_picture, to_uint8
from moa import record_routing
from moa.loss import mean_routing
from pipeline import Pipeline, Subject
from toyworld.classifier import Classifier

BATCH = 16  # cases drawn, pictures read at once
SEEDS = 4  # per case in `variety`, which a sixteenth of the cases is enough for
RENDERS = 400  # held-out scenes that the classifier itself is measured on, at most
DILATION = 9  # pixels, a window: people's masks are widened by half of it before "outside" begins
KINDS = ("self", "cross")
START = 1000  # the subjects are there at timesteps below this one: at all of them
SEEN = 1  # of 255: a swap that changes the people by less changes nothing
FEWEST = 8  # values that an interval is drawn from: of fewer, resampling finds far too narrow ones
# Score -> what is good, and which of the classifier's own numbers says how far to trust it.
SCORES = {"context": ("high", "context"), "activity": ("high", "activity"), "count": ("high", "count"),
          "identity": ("high", "identity"), "mixup": ("low", "mixup"), "locality": ("low", "people_iou"),
          "prior_agreement": ("high", "people_iou"), "background_distance": ("low", "people_iou"),
          "variety": ("near 1", None), "router_gap": ("high", "people_iou"),
          "router_iou": ("high", "people_iou"), "prior_context": ("high", "context"),
          "prior_activity": ("high", "activity"), "prior_count": ("high", "count"),
          "prior_identity": ("chance", "identity"), "prior_mixup": ("chance", "mixup"),
          "seconds_prior": ("low", None), "seconds_moa": ("low", None), "seconds_ratio": ("low", None)}
NAMES = {"mixup": "identity mix-up", "locality": "background change"}  # of scores, where people read them


@dataclass
class Reading:
    """What the classifier reads off one picture."""

    activity: int
    context: int
    count: int  # people
    attributes: dict[str, list[int]]  # name -> class index per person, from left to right
    people: np.ndarray  # (S, S) bool, where the people are


@dataclass
class Case:
    """One prompt and seed: pictures and readings of the prior and with two sets of subjects."""

    number: int
    scene: toyworld.Scene  # with the first subjects
    other: toyworld.Scene  # with the second
    pictures: np.ndarray  # (3, S, S, 3) uint8: by the prior, with the first, with the second subjects
    readings: list[Reading]  # three
    routing: np.ndarray  # (2, L, T, h, w) weight of the personalized expert by kind, layer and timestep


# --- cases ---


def case_scenes(number: int) -> list[toyworld.Scene]:
    """The two scenes of a case, alike but for the people: test identities, and a prompt that training never
    saw with them."""
    plan = toyworld.sample_scene(1_000_000 + number, "test")
    rng = np.random.default_rng([number, 20240416])
    groups = [[toyworld.sample_identity(rng, "test", subject.identity.noun) for subject in plan.subjects]
              for _ in range(2)]
    return [toyworld.compose_scene(number, people, plan.activity, plan.context) for people in groups]


def references_of(scene: toyworld.Scene, number: int, which: int) -> np.ndarray:
    """(people, S, S, 3) uint8: pictures of a scene's subjects, in another pose. which: 0 or 1, the scene."""
    return np.stack([toyworld.render_reference(s.identity, 10 * number + which) for s in scene.subjects])


def subjects_of(pipeline: Pipeline, scene: toyworld.Scene, photos: Sequence[np.ndarray],
                start: int = START) -> list[Subject]:
    """The subjects of a scene for `Pipeline.generate`, there at timesteps below `start`. photos: one of each,
    (H, W, 3) uint8."""
    features = [pipeline.encode_subjects(to_picture(photo[None]) / 2 + 0.5)[0] for photo in photos]
    positions = [len(pipeline.models.tokenize.encode(scene.caption[:s.end])) for s in scene.subjects]
    return [Subject(p, f, start) for p, f in zip(positions, features, strict=True)]


def draw_cases(pipeline: Pipeline, classifier: Classifier, numbers: Sequence[int], start: int = START,
               photos: Callable[[toyworld.Scene, int, int], Sequence[np.ndarray]] = references_of,
               **options) -> tuple[list[Case], dict[str, float]]:
    """Draw a batch of cases and have them read; options are those of `Pipeline.generate`. photos: the
    pictures of a scene's subjects, as `references_of` gives them.

    Returns the cases and the seconds per picture of the prior and of MoA, taken in turns. MoA's is that of
    the second subjects: recording slows down the first.
    """
    scenes = [case_scenes(number) for number in numbers]
    prompts = [first.caption for first, _ in scenes]
    seeds = [7_000_000 + number for number in numbers]
    pictures, readings, seconds, maps = [], [], [], []

    def generate(subjects, progress=None) -> None:
        begin = time.perf_counter()
        images = pipeline.generate(prompts, seeds, subjects, prior_only=subjects is None, progress=progress,
                                   **options)
        seconds.append((time.perf_counter() - begin) / len(prompts))
        pictures.append(to_uint8(images))
        readings.append(read(classifier, images))

    subjects = [[subjects_of(pipeline, pair[k], photos(pair[k], number, k), start)
                 for number, pair in zip(numbers, scenes, strict=True)] for k in range(2)]
    generate(None)
    with record_routing(pipeline.models.unet) as routing:
        generate(subjects[0], keep_maps(routing, maps, options.get("sparse", 0)))
    generate(subjects[1])
    routing = np.stack(maps, axis=3)  # (B, 2, L, T, h, w)
    cases = [Case(number, *scenes[i], np.stack([p[i] for p in pictures]), [r[i] for r in readings],
                  routing[i]) for i, number in enumerate(numbers)]
    return cases, {"prior": seconds[0], "moa": seconds[2]}


def keep_maps(routing: dict, maps: list[np.ndarray], sparse: float = 0) -> Callable:
    """A progress callback that adds each step's routing to `maps`, brought to the latents' grid as in Eq. 10:
    (B, 2, L, h, w). Weights up to `sparse` are 0. Steps that the prior draws alone have none."""
    def progress(step: int, steps: int, t: int, x0: Tensor) -> None:
        def grid(layer: int, kind: str) -> np.ndarray:
            weight = routing[layer, kind][-len(x0):, :, 1]  # of a guided batch the half with the prompt
            return mean_routing([weight * (weight > sparse)], *x0.shape[-2:]).cpu().numpy()

        if routing:
            layers = range(len(routing) // len(KINDS))
            maps.append(np.stack([np.stack([grid(layer, kind) for layer in layers], axis=1)
                                  for kind in KINDS], axis=1))
            routing.clear()
    return progress


@torch.no_grad()
def read(classifier: Classifier, pictures: Tensor) -> list[Reading]:
    """Have the classifier read (B, 3, S, S) pictures in [-1, 1].

    Raises ValueError for NaN, of which it would read something as well.
    """
    if not torch.isfinite(pictures).all():
        raise ValueError("a picture came out as NaN: the weights are broken")
    device, found = next(classifier.parameters()).device, []
    for images in pictures.split(BATCH):
        logits = classifier(images.to(device))
        people = F.interpolate(logits.people.softmax(1), images.shape[-2:], mode="bilinear")[:, 0] < 0.5
        attributes = {name: values.argmax(-1).tolist() for name, values in logits.attributes.items()}
        found += [Reading(int(logits.activity[i].argmax()), int(logits.context[i].argmax()),
                          int(logits.count[i].argmax()) + 1, {k: v[i] for k, v in attributes.items()},
                          people[i].cpu().numpy()) for i in range(len(images))]
    return found


# --- what is read off one picture ---


def context_right(scene: toyworld.Scene, reading: Reading) -> bool:
    """Was the prompt's place read?"""
    return toyworld.CONTEXTS[reading.context] == scene.context


def activity_right(scene: toyworld.Scene, reading: Reading) -> bool:
    """Was the prompt's activity read?"""
    return toyworld.ACTIVITIES[reading.activity] == scene.activity


def count_right(scene: toyworld.Scene, reading: Reading) -> bool:
    """Were as many people read as the prompt names?"""
    return reading.count == len(scene.subjects)


def attribute_hits(scene: toyworld.Scene, reading: Reading) -> list[tuple[int, str, bool]]:
    """(number from the left, attribute, read right) of what is visible of every subject."""
    labels = [toyworld.attribute_labels(subject.identity) for subject in scene.subjects]
    return [(k, name, reading.attributes[name][k] == labels[k][name])
            for k, subject in enumerate(scene.subjects) for name in subject.visible]


def identity(scene: toyworld.Scene, reading: Reading) -> float:
    """Share of the subjects' visible attributes that was read right."""
    return float(np.mean([right for _, _, right in attribute_hits(scene, reading)]))


def mixup(scene: toyworld.Scene, reading: Reading) -> float:
    """Of the attributes in which two subjects differ, the share that was read as the other one's."""
    if len(scene.subjects) < 2:
        return float("nan")
    labels = [toyworld.attribute_labels(subject.identity) for subject in scene.subjects]
    mixed = [reading.attributes[name][k] == labels[1 - k][name]
             for k, subject in enumerate(scene.subjects) for name in subject.visible
             if labels[0][name] != labels[1][name]]
    return float(np.mean(mixed)) if mixed else float("nan")


READ_OFF = {"context": context_right, "activity": activity_right, "count": count_right, "identity": identity,
            "mixup": mixup}


# --- what a case's pictures and routing maps say ---


def background_change(case: Case) -> float:
    """Mean change of pixels outside the people over that inside, between the two sets of subjects; NaN where
    there are no people or nothing else, and where the people do not change."""
    change = np.abs(case.pictures[1].astype(int) - case.pictures[2]).mean(-1)
    people = case.readings[1].people | case.readings[2].people
    outside = ~widened(people)
    if not people.any() or not outside.any() or change[people].mean() < SEEN:
        return float("nan")
    return float(change[outside].mean() / change[people].mean())


def prior_agreement(case: Case) -> float:
    """IoU of the people's masks in the prior's picture and in the personalized one."""
    return iou(case.readings[0].people, case.readings[1].people)


def background_distance(case: Case) -> float:
    """Mean absolute difference to the prior's picture outside both pictures' people, in 0..1."""
    outside = ~(widened(case.readings[0].people) | widened(case.readings[1].people))
    change = np.abs(case.pictures[1].astype(int) - case.pictures[0]).mean(-1) / 255
    return float(change[outside].mean()) if outside.any() else float("nan")


def router_gap(case: Case) -> float:
    """The prior's mean weight outside the people minus that inside, over all layers and timesteps."""
    people, background = router_weights(case)
    return float((people - background).mean())


def router_iou(case: Case) -> float:
    """Overlap of the people with the mean routing map, thresholded halfway between its extremes."""
    return float(map_iou(case.routing.mean((0, 1, 2)), coverage(case)))


OF_CASES = {"locality": background_change, "prior_agreement": prior_agreement,
            "background_distance": background_distance, "router_gap": router_gap, "router_iou": router_iou}


def widened(people: np.ndarray) -> np.ndarray:
    """(S, S) bool mask of people and of `DILATION` // 2 pixels around them."""
    return np.array(Image.fromarray(people).convert("L").filter(ImageFilter.MaxFilter(DILATION))) > 0


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks; 0 when both are empty."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def coverage(case: Case) -> np.ndarray:
    """(h, w) in [0, 1]: how much of each cell of the routing maps the first subjects cover."""
    mask = Image.fromarray(case.readings[1].people).convert("L")
    return np.array(mask.resize(case.routing.shape[:-3:-1], Image.Resampling.BOX)) / 255


def map_iou(routing: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """IoUs (...) of the people with maps (..., h, w), each thresholded halfway between its extremes."""
    extremes = routing.min((-1, -2), keepdims=True) + routing.max((-1, -2), keepdims=True)
    found, people = routing > extremes / 2, cover > 127 / 255
    return (found & people).sum((-1, -2)) / np.maximum((found | people).sum((-1, -2)), 1)


def router_weights(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Mean weight of the personalized expert on people and in the background: (2, L, T) each, NaN
    where there are none."""
    cover = coverage(case)
    with np.errstate(invalid="ignore"):
        return tuple(np.divide((case.routing * share).sum((-1, -2)), share.sum()) for share in
                     (cover, 1 - cover))


def router_arrays(cases: list[Case], timesteps: list[int]) -> dict:
    """The routers layer by layer and timestep by timestep.

    Weights are those of the personalized expert, IoUs those of each map alone. "grid" has arrays of
    axes kind, layer, timestep; "per_layer" (kind, layer) and "per_timestep" (timestep) are its means.
    """
    people, background = np.swapaxes([router_weights(case) for case in cases], 0, 1)  # (n, 2, L, T) each
    ious = np.array([map_iou(case.routing, coverage(case)) for case in cases])
    values = {"people": people, "background": background, "gap": people - background, "iou": ious}
    views = {"per_layer": (-1,), "per_timestep": (1, 2), "grid": ()}
    return {"kinds": list(KINDS), "layers": list(range(people.shape[2])), "timesteps": timesteps,
            **{view: {name: interval(value.mean(axes) if axes else value, digits=4)
                      for name, value in values.items()} for view, axes in views.items()}}


# --- scores of many cases ---


def variety(pipeline: Pipeline, numbers: Sequence[int], start: int = START, **options) -> list[float]:
    """How much the pictures of each case differ over `SEEDS` seeds, relative to how much the prior's do.

    Mean absolute difference of pixels over all pairs of seeds, with the case's subjects over without;
    1 keeps the prior's variety, 0 draws the same picture again and again. One number per case.
    """
    ratios = []
    for number in numbers:
        scene, _ = case_scenes(number)
        subjects = [subjects_of(pipeline, scene, references_of(scene, number, 0), start)] * SEEDS
        seeds = [8_000_000 + SEEDS * number + k for k in range(SEEDS)]
        distances = [pairwise_distance(pipeline.generate([scene.caption] * SEEDS, seeds, subjects,
                                                         prior_only=prior, **options))
                     for prior in (False, True)]
        ratios.append(distances[0] / distances[1])
    return ratios


def speed(seconds: list[dict[str, float]]) -> dict[str, dict]:
    """Medians over batches of the seconds per picture, and of their ratio batch by batch."""
    return {"seconds_prior": interval([s["prior"] for s in seconds], "median"),
            "seconds_moa": interval([s["moa"] for s in seconds], "median"),
            "seconds_ratio": interval([s["moa"] / s["prior"] for s in seconds], "median")}


def classifier_scores(classifier: Classifier, count: int = RENDERS) -> dict[str, dict]:
    """The same scores of held-out renders, and the IoU of the people that the classifier finds in them: what
    it gives where everything is right."""
    values, hits, asked = {name: [] for name in (*READ_OFF, "people_iou")}, [], []
    for first in range(0, count, 50):
        scenes = [toyworld.sample_scene(2_000_000 + k, "test") for k in range(first, min(first + 50, count))]
        images, masks = zip(*map(toyworld.render_scene, scenes), strict=True)
        readings = read(classifier, to_picture(np.stack(images)))
        for scene, mask, reading in zip(scenes, masks, readings, strict=True):
            hits += attribute_hits(scene, reading)
            asked.append(scene.activity)
            values["people_iou"].append(iou(mask.any(0), reading.people))
            for name, score in READ_OFF.items():
                values[name].append(score(scene, reading))
    return {**{name: interval(value) for name, value in values.items()},
            "attributes": by_name(hits, toyworld.ATTRIBUTES),
            "activities": by_name(list(zip(asked, values["activity"], strict=True)), toyworld.ACTIVITIES)}


def by_name(hits: list[tuple], names: Sequence[str]) -> dict[str, dict]:
    """Name -> its share of hits, of tuples that end in a name and whether it was read right."""
    return {name: interval([right for *_, of, right in hits if of == name]) for name in names}


def case_scores(cases: list[Case]) -> dict[str, list[float | bool]]:
    """Score -> its values case by case, NaN where a case has none."""
    read_off = {prefix + name: [score(case.scene, case.readings[which]) for case in cases]
                for prefix, which in (("", 1), ("prior_", 0)) for name, score in READ_OFF.items()}
    return read_off | {name: [score(case) for case in cases] for name, score in OF_CASES.items()}


def scores(cases: list[Case], ratios: list[float], seconds: list[dict], ceiling: dict) -> dict:
    """All scores, each with its mean or median, 95 % interval, number of cases and, where the classifier has
    a part in it, its own number; and case by case, None where a case has none."""
    values = case_scores(cases)
    results = {name: interval(found) for name, found in values.items()}
    results |= {"variety": interval(ratios), **speed(seconds)}
    for name, (_, own) in SCORES.items():
        if own:
            results[name]["judge"] = ceiling[own]["mean"]
    kinds = {"attributes": by_name([hit for c in cases for hit in attribute_hits(c.scene, c.readings[1])],
                                   toyworld.ATTRIBUTES)}
    asked = [case.scene.activity for case in cases]
    for prefix in ("", "prior_"):
        done = list(zip(asked, values[f"{prefix}activity"], strict=True))
        kinds[f"{prefix}activities"] = by_name(done, toyworld.ACTIVITIES)
    for kind, shares in kinds.items():
        for name, value in shares.items():
            value["judge"] = ceiling[kind.removeprefix("prior_")][name]["mean"]
    each = {name: [None if np.isnan(value) else round(float(value), 4) for value in found]
            for name, found in values.items()}
    return {**results, **kinds,
            "cases": {"number": [case.number for case in cases], **each}}


def interval(values: Sequence, center: str = "mean", digits: int | None = None) -> dict:
    """Mean or median and 95 % interval of the values that are not NaN, without one for less than `FEWEST`.

    values: (n,), or (n, ...) for arrays in place of numbers. Of bools, shares of yes and no, the interval is
    Wilson's, which is not empty where all agree, else the bootstrap's. digits: round to so many.
    """
    yes_or_no = all(isinstance(value, (bool, np.bool_)) for value in values)
    values = np.array(values, dtype=float)
    values = values[~np.isnan(values).any(tuple(range(1, values.ndim)))]
    middle = getattr(np, center)
    found = {center: middle(values, 0) if len(values) else None, "low": None, "high": None}
    if len(values) >= FEWEST:
        found["low"], found["high"] = wilson(values) if yes_or_no else bootstrap(values, middle)
    return {**{k: v if v is None else (v if digits is None else np.round(v, digits)).tolist()
               for k, v in found.items()}, "n": len(values)}


def bootstrap(values: np.ndarray, middle: Callable) -> np.ndarray:
    """(2, ...): the middle 95 % of 1,000 means or medians of values drawn with replacement."""
    rng = np.random.default_rng(0)
    draws = [middle(values[rows], 0) for rows in rng.integers(len(values), size=(1000, len(values)))]
    return np.percentile(draws, [2.5, 97.5], axis=0)


def wilson(values: np.ndarray) -> np.ndarray:
    """(2,): Wilson's 95 % interval of the mean of values in 0..1, each a yes or no."""
    n, share, z = len(values), values.mean(), 1.96
    center = (share + z ** 2 / (2 * n)) / (1 + z ** 2 / n)
    half = z / (1 + z ** 2 / n) * (share * (1 - share) / n + z ** 2 / (4 * n ** 2)) ** 0.5
    return np.array([center - half, center + half]).clip(0, 1)
