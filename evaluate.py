"""Measure what Mixture-of-Attention does in the small world, where every identity is known.

    python evaluate.py
    python evaluate.py --weights runs/moa --output runs/evaluation_moa

Each case is a held-out prompt and seed, drawn three times: by the prior alone, with held-out subjects,
and with other subjects of the same nouns. A judge that was trained on rendered pictures only reads
the pictures. Cases, seeds and subjects are fixed by their number; nothing is picked. Writes
results.json, results.md, contact sheets of the first and of the worst cases with their routing maps,
and router.png. What each score means, and what it cannot see, is in docs/results.md.
"""
import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from pipeline import reuse_memory
from sample import read_json
import toyworld
from models.errors import one_line

SHIPPED = Path(__file__).resolve().parent / "weights" / "toyworld"
BATCH = 16
SEEDS = 4  # per case in `variety`, which a sixteenth of the cases is enough for
DILATION = 9  # pixels, a window: people's masks are widened by half of it before "outside" begins
KINDS = ("self", "cross")
SHOWN = 16  # cases on each contact sheet
START = 1000  # the subjects are there at timesteps below this one: at all of them
SEEN = 1  # of 255: a swap that changes the people by less changes nothing
FEWEST = 8  # values that an interval is drawn from: of fewer, resampling finds far too narrow ones
# Score -> what is good, and which of the judge's own numbers says how far to trust it.
SCORES = {"context": ("high", "context"), "activity": ("high", "activity"), "count": ("high", "count"),
          "identity": ("high", "identity"), "mixup": ("low", "mixup"), "locality": ("low", "people_iou"),
          "prior_agreement": ("high", "people_iou"), "background_distance": ("low", "people_iou"),
          "variety": ("near 1", None), "router_gap": ("high", "people_iou"),
          "router_iou": ("high", "people_iou"), "prior_context": ("high", "context"),
          "prior_activity": ("high", "activity"), "prior_count": ("high", "count"),
          "prior_identity": ("chance", "identity"), "prior_mixup": ("chance", "mixup"),
          "seconds_prior": ("low", None), "seconds_moa": ("low", None), "seconds_ratio": ("low", None)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/evaluation"), metavar="FOLDER",
        help="for results and sheets (default runs/evaluation)")
    add("--weights", type=Path, default=SHIPPED, metavar="FOLDER", help="default: the small world")
    add("--moa", type=Path, metavar="FILE", help="default: moa.safetensors in the weights folder")
    add("--judge", type=Path, metavar="FILE",
        help="default: judge.safetensors in the weights folder, or the shipped one")
    add("--count", type=int, default=256, metavar="N", help="how many cases (default 256)")
    add("--first", type=int, default=0, metavar="CASE",
        help="number of the first case: others than those that something was chosen by (default 0)")
    add("--steps", type=int, default=20, metavar="N", help="sampling steps (default 20)")
    add("--guidance-scale", type=float, metavar="SCALE",
        help="classifier-free guidance; 1 is none (default: the weights')")
    add("--prior-above", type=int, metavar="T",
        help="the base model draws alone at timesteps from T on (default: the weights', or 800)")
    add("--start", type=int, default=START, metavar="T",
        help=f"the subjects are there at timesteps below T (default {START})")
    add("--sparse", type=float, default=0.0, metavar="WEIGHT",
        help="sparse routing: router weights up to this count as 0 (default 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    reuse_memory()
    try:
        run(args)
    except (ValueError, OSError) as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error):  # on a CPU, torch has no error class for it
            raise
        print("error: not enough memory", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: argparse.Namespace) -> None:
    """Draw all cases, read them, write scores and sheets."""
    import torch

    from models.load import write_json, write_whole
    start = time.perf_counter()
    fill_in(args)
    timesteps = check(args)
    pipeline, judge, files = load(args)
    options = {"steps": args.steps, "guidance_scale": args.guidance_scale, "prior_above": args.prior_above,
               "sparse": args.sparse}
    settings = {"count": args.count, "first": args.first, **options, "start": args.start,
                "weights": args.weights.resolve().name, "moa": files["moa"].name}
    run_by = source(pipeline.device, files)
    spare_others(args.output / "results.json", settings, run_by["sha256"])
    every, cases, seconds = range(args.first, args.first + args.count), [], []
    with torch.no_grad():
        for done in progress(range(0, args.count, BATCH)):
            drawn, took = draw(pipeline, judge, every[done:done + BATCH], start=args.start, **options)
            cases += drawn
            seconds.append(took)
        ceiling = judge_accuracy(judge)
        ratios = variety(pipeline, every[:max(1, args.count // 16)], start=args.start, **options)
    router = router_arrays(cases, timesteps)
    draw_sheets(cases, router, args.output)
    run_by["seconds"] = round(time.perf_counter() - start, 1)
    results = {"settings": settings, "run": run_by, **scores(cases, ratios, seconds, ceiling),
               "judge": ceiling,
               "worst": {name: [describe(case) for case in chosen] for name, chosen in worst(cases).items()},
               "router": router}
    write_json(results, args.output / "results.json")
    table = markdown(results)
    write_whole(args.output / "results.md", lambda temporary: temporary.write_text(table, encoding="utf-8"))
    print(table)


def progress(batches):
    from tqdm import tqdm
    return tqdm(batches, "drawing", unit="batch")


def fill_in(args: argparse.Namespace) -> None:
    """Take what the flags leave open from the weights' config.json.

    Raises ValueError if they are of another world or say nothing about guidance, and WeightsError.
    """
    from models.load import read_config
    config = read_config(args.weights)
    if config.get("world") != "toyworld" or config.get("image_size") != toyworld.SIZE:
        raise ValueError(f"--weights {args.weights} is not of the small world, the only one whose people "
                         "are known: give its weights, or the folder of a train.py moa run; SD1.5's are for "
                         "bench/faces.py")
    sampling = config.get("sampling")
    found = {"prior_above": 800, **(sampling if isinstance(sampling, dict) else {})}
    for name in ("guidance_scale", "prior_above"):
        if getattr(args, name) is None:
            setattr(args, name, found.get(name))
        if not isinstance(getattr(args, name), (int, float)):
            raise ValueError(f"config.json of {args.weights} names no {name.replace('_', ' ')}: give "
                             f"--{name.replace('_', '-')}")


def check(args: argparse.Namespace) -> list[int]:
    """The timesteps at which MoA draws, falling. Makes the output folder.

    Raises ValueError for the first setting that cannot be evaluated, before anything is loaded.
    """
    if args.count < 2:
        raise ValueError(f"--count must be at least 2, not {args.count}")
    if args.first < 0:
        raise ValueError(f"--first must be at least 0, not {args.first}")
    if not 1 <= args.start <= START:
        raise ValueError(f"--start must be in 1..{START}, not {args.start}")
    if not 0 <= args.sparse <= 1:
        raise ValueError(f"--sparse must be in 0..1, not {args.sparse}")
    if not 0 <= args.guidance_scale <= 100:
        raise ValueError(f"--guidance-scale must be in 0..100, not {args.guidance_scale}")
    below = moa_timesteps(args.steps, args.prior_above, f"--prior-above {args.prior_above} leaves")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output):
            pass
    except OSError as error:
        raise ValueError(f"--output {args.output} cannot be written: {error.strerror}") from error
    return below


def moa_timesteps(steps: int, prior_above: int, blamed: str, sampler: str = "unipc") -> list[int]:
    """The timesteps at which MoA draws, falling. Raises ValueError, which begins with the flag that is to
    blame, where there are none."""
    from samplers import SAMPLERS, timesteps_of
    below = [t for t in timesteps_of(SAMPLERS[sampler], steps) if t < prior_above]
    if not below:
        raise ValueError(f"{blamed} nothing to MoA: none of the {steps} steps' timesteps lies below "
                         f"{prior_above}")
    return below


def spare_others(path: Path, settings: dict, sums: dict[str, str]) -> None:
    """Raises ValueError where there are results of other cases, settings or weights already."""
    if not path.exists():
        return
    found = read_json(path)
    if not isinstance(found, dict) or (found.get("settings"), found.get("run", {}).get("sha256")) != (
            settings, sums):
        raise ValueError(f"{path} is of other cases, settings or weights: give another --output, or remove "
                         "it")


def load(args: argparse.Namespace):
    """The pipeline, the judge and the files that they come from.

    Raises ValueError or WeightsError when one is missing or broken.
    """
    from pipeline import Pipeline, pick_device
    judge_here = args.weights / "judge.safetensors"
    files = {part: args.weights / f"{part}.safetensors"
             for part in ("unet", "vae", "text_encoder", "image_encoder")}
    files["moa"] = args.moa or args.weights / "moa.safetensors"
    files["judge"] = args.judge or (judge_here if judge_here.is_file() else SHIPPED / judge_here.name)
    for name, path in files.items():
        if not path.is_file():
            raise ValueError(f"{path} not found: the evaluation needs {name.replace('_', ' ')} weights")
    pipeline = Pipeline.load(args.weights, files["moa"], pick_device(args.device))
    return pipeline, load_judge(files["judge"], pipeline.device), files


def load_judge(path: Path, device="cpu"):
    """The judge. Raises WeightsError."""
    from toyworld.judge import Judge
    from models.load import check_exact, read_tensors
    judge = Judge()
    state = {k: v.float() for k, v in read_tensors(path).items()}
    check_exact(state, judge.state_dict(), path)
    judge.load_state_dict(state)
    return judge.eval().to(device)


def checksum(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()[:16]


def source(device, files: dict[str, Path]) -> dict:
    """What results come from: code, torch, device, threads, and the checksums of the weights' `files`."""
    import torch

    from train import git_describe
    return {"code": git_describe(), "torch": torch.__version__, "device": device_name(device),
            "threads": torch.get_num_threads(),
            "sha256": {name: checksum(path) for name, path in files.items()}}


def device_name(device) -> str:
    """cpu, or the name of the GPU."""
    import torch
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# --- cases ---


@dataclass
class Reading:
    """What the judge reads off one picture."""

    activity: int
    context: int
    count: int  # people
    attributes: dict[str, list[int]]  # name -> class index per person, from left to right
    people: np.ndarray  # (S, S) bool, where the people are


@dataclass
class Case:
    """One prompt and seed: pictures and readings of the prior and of two castings."""

    number: int
    scene: toyworld.Scene  # of the first casting
    other: toyworld.Scene  # of the second
    pictures: np.ndarray  # (3, S, S, 3) uint8: prior, first, second casting
    readings: list[Reading]  # three
    routing: np.ndarray  # (2, L, T, h, w) weight of the personalized expert by kind, layer and timestep


def cast(number: int) -> list[toyworld.Scene]:
    """The two castings of a case: test identities and a prompt that training never saw with them."""
    plan = toyworld.sample_scene(1_000_000 + number, "test")
    rng = np.random.default_rng([number, 20240416])
    castings = [[toyworld.sample_identity(rng, "test", subject.identity.noun) for subject in plan.subjects]
                for _ in range(2)]
    return [toyworld.compose_scene(number, people, plan.activity, plan.context) for people in castings]


def draw(pipeline, judge, numbers, start: int = START, **options) -> tuple[list[Case], dict[str, float]]:
    """Draw a batch of cases and have them read; options are those of `Pipeline.generate`.

    Returns the cases and the seconds per picture of the prior and of MoA, taken in turns. MoA's is
    the second casting's: recording slows down the first.
    """
    from moa import record_routing
    from images import to_uint8
    castings = [cast(number) for number in numbers]
    prompts = [first.caption for first, _ in castings]
    seeds = [7_000_000 + number for number in numbers]
    pictures, readings, seconds, maps = [], [], [], []

    def generate(people, progress=None):
        start = time.perf_counter()
        images = pipeline.generate(prompts, seeds, people, prior_only=people is None, progress=progress,
                                   **options)
        seconds.append((time.perf_counter() - start) / len(prompts))
        pictures.append(to_uint8(images))
        readings.append(read(judge, images))

    people = [[subjects_of(pipeline, scenes[k], references_of(scenes[k], number, k), start)
               for number, scenes in zip(numbers, castings, strict=True)] for k in range(2)]
    generate(None)
    with record_routing(pipeline.models.unet) as routing:
        generate(people[0], collector(routing, maps, options.get("sparse", 0)))
    generate(people[1])
    routing = np.stack(maps, axis=3)  # (B, 2, L, T, h, w)
    cases = [Case(number, *castings[i], np.stack([p[i] for p in pictures]), [r[i] for r in readings],
                  routing[i]) for i, number in enumerate(numbers)]
    return cases, {"prior": seconds[0], "moa": seconds[2]}


def references_of(scene: toyworld.Scene, number: int, casting: int) -> np.ndarray:
    """(people, S, S, 3) uint8: pictures of a scene's subjects, in another pose."""
    return np.stack([toyworld.render_reference(s.identity, 10 * number + casting) for s in scene.subjects])


def subjects_of(pipeline, scene: toyworld.Scene, photos: np.ndarray, start: int = START) -> list:
    """The subjects of a scene for `Pipeline.generate`, there at timesteps below `start`."""
    from images import to_picture
    from pipeline import Subject
    features = pipeline.encode_subjects(to_picture(photos) / 2 + 0.5)
    places = [len(pipeline.models.tokenize.encode(scene.caption[:s.end])) for s in scene.subjects]
    return [Subject(p, f, start) for p, f in zip(places, features, strict=True)]


def collector(routing: dict, maps: list, sparse: float = 0):
    """A progress callback that keeps each step's routing, brought to the latents' grid as in Eq. 10:
    (B, 2, L, h, w). Weights up to `sparse` are 0. Steps that the prior draws alone have none."""
    from moa.loss import mean_routing

    def collect(step, steps, t, x0):
        def grid(layer, kind):
            weight = routing[layer, kind][-len(x0):, :, 1]
            return mean_routing([weight * (weight > sparse)], *x0.shape[-2:]).cpu().numpy()

        if routing:
            layers = range(len(routing) // len(KINDS))
            maps.append(np.stack([np.stack([grid(layer, kind) for layer in layers], axis=1)
                                  for kind in KINDS], axis=1))
            routing.clear()
    return collect


def read(judge, pictures) -> list[Reading]:
    """Have the judge read (B, 3, S, S) pictures in [-1, 1], `BATCH` of them at once.

    Raises ValueError for NaN, of which the judge would read something as well.
    """
    import torch
    if not torch.isfinite(pictures).all():
        raise ValueError("a picture came out as NaN: the weights are broken")
    device = next(judge.parameters()).device
    with torch.no_grad():
        return [reading for images in pictures.split(BATCH)
                for reading in read_batch(judge, images.to(device))]


def read_batch(judge, images) -> list[Reading]:
    """`read`, of a batch on the judge's device."""
    import torch.nn.functional as F
    verdict = judge(images)
    people = F.interpolate(verdict.people.softmax(1), images.shape[-2:], mode="bilinear")[:, 0] < 0.5
    attributes = {name: logits.argmax(-1).tolist() for name, logits in verdict.attributes.items()}
    return [Reading(int(verdict.activity[i].argmax()), int(verdict.context[i].argmax()),
                    int(verdict.count[i].argmax()) + 1, {k: v[i] for k, v in attributes.items()},
                    people[i].cpu().numpy()) for i in range(len(images))]


# --- scores: each has its paragraph in docs/results.md ---


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
    """(place from the left, attribute, read right) of what is visible of every subject."""
    labels = [toyworld.attribute_labels(subject.identity) for subject in scene.subjects]
    return [(place, name, reading.attributes[name][place] == labels[place][name])
            for place, subject in enumerate(scene.subjects) for name in subject.visible]


def identity(scene: toyworld.Scene, reading: Reading) -> float:
    """Share of the subjects' visible attributes that was read right."""
    return float(np.mean([right for _, _, right in attribute_hits(scene, reading)]))


def mixup(scene: toyworld.Scene, reading: Reading) -> float:
    """Of the attributes in which two subjects differ, the share that was read as the other one's."""
    if len(scene.subjects) < 2:
        return float("nan")
    labels = [toyworld.attribute_labels(subject.identity) for subject in scene.subjects]
    mixed = [reading.attributes[name][place] == labels[1 - place][name]
             for place, subject in enumerate(scene.subjects) for name in subject.visible
             if labels[0][name] != labels[1][name]]
    return float(np.mean(mixed)) if mixed else float("nan")


# What can be read off one picture.
READ_OFF = {"context": context_right, "activity": activity_right, "count": count_right, "identity": identity,
            "mixup": mixup}


def locality(case: Case) -> float:
    """Mean change of pixels outside the people over that inside, between the two castings; NaN where there
    are no people or nothing else, and where the people do not change."""
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


def variety(pipeline, numbers, start: int = START, **options) -> list[float]:
    """How much the pictures of each case differ over `SEEDS` seeds, relative to how much the prior's do.

    Mean absolute difference of pixels over all pairs of seeds, with the case's subjects over without;
    1 keeps the prior's variety, 0 draws the same picture again and again. One number per case.
    """
    from images import pairwise_distance
    ratios = []
    for number in numbers:
        scene = cast(number)[0]
        people = [subjects_of(pipeline, scene, references_of(scene, number, 0), start)] * SEEDS
        seeds = [8_000_000 + SEEDS * number + k for k in range(SEEDS)]
        distances = [pairwise_distance(pipeline.generate([scene.caption] * SEEDS, seeds, people,
                                                         prior_only=prior, **options))
                     for prior in (False, True)]
        ratios.append(distances[0] / distances[1])
    return ratios


def speed(seconds: list[dict[str, float]]) -> dict[str, dict]:
    """Medians over batches of the seconds per picture, and of their ratio batch by batch."""
    return {"seconds_prior": interval([s["prior"] for s in seconds], "median"),
            "seconds_moa": interval([s["moa"] for s in seconds], "median"),
            "seconds_ratio": interval([s["moa"] / s["prior"] for s in seconds], "median")}


def widened(people: np.ndarray) -> np.ndarray:
    """(S, S) bool mask of people and of `DILATION` // 2 pixels around them."""
    return np.array(Image.fromarray(people).convert("L").filter(ImageFilter.MaxFilter(DILATION))) > 0


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks; 0 when both are empty."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def coverage(case: Case) -> np.ndarray:
    """(h, w) in [0, 1]: how much of each cell of the routing maps the people of the first casting cover."""
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


def judge_accuracy(judge, count: int = 400) -> dict[str, dict]:
    """The same scores of held-out renders, and the IoU of the people that the judge finds in them: what
    the judge gives where everything is right."""
    from images import to_picture
    values, hits, asked = {name: [] for name in (*READ_OFF, "people_iou")}, [], []
    for first in range(0, count, 50):
        scenes = [toyworld.sample_scene(2_000_000 + k, "test") for k in range(first, first + 50)]
        images, masks = zip(*map(toyworld.render_scene, scenes), strict=True)
        readings = read(judge, to_picture(np.stack(images)))
        for scene, mask, reading in zip(scenes, masks, readings, strict=True):
            hits += attribute_hits(scene, reading)
            asked.append(scene.activity)
            values["people_iou"].append(iou(mask.any(0), reading.people))
            for name, score in READ_OFF.items():
                values[name].append(score(scene, reading))
    return {**{name: interval(value) for name, value in values.items()},
            "attributes": by_name(hits, toyworld.ATTRIBUTES),
            "activities": by_name(list(zip(asked, values["activity"], strict=True)), toyworld.ACTIVITIES)}


def by_name(hits: list[tuple], names) -> dict[str, dict]:
    """Name -> its share of hits, of tuples that end in a name and whether it was read right."""
    return {name: interval([right for *_, of, right in hits if of == name]) for name in names}


def case_scores(cases: list[Case]) -> dict[str, list[float | bool]]:
    """Score -> its values case by case, NaN where a case has none."""
    read_off = {prefix + name: [score(case.scene, case.readings[which]) for case in cases]
                for prefix, which in (("", 1), ("prior_", 0)) for name, score in READ_OFF.items()}
    return read_off | {score.__name__: [score(case) for case in cases] for score in
                       (locality, prior_agreement, background_distance, router_gap, router_iou)}


def scores(cases: list[Case], ratios: list[float], seconds: list[dict], ceiling: dict) -> dict:
    """All scores, each with its mean or median, 95 % interval, number of cases and, where the judge has a
    part in it, the judge's own number; and case by case, None where a case has none."""
    values = case_scores(cases)
    results = {name: interval(found) for name, found in values.items()}
    results |= {"variety": interval(ratios), **speed(seconds)}
    for name, (_, judged) in SCORES.items():
        if judged:
            results[name]["judge"] = ceiling[judged]["mean"]
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


def interval(values, center: str = "mean", digits: int | None = None, yes_or_no: bool | None = None) -> dict:
    """Mean or median and 95 % interval of the values that are not NaN, without one for less than `FEWEST`.

    values: (n,), or (n, ...) for arrays in place of numbers. Of shares of yes and no, by default where all
    are bools, the interval is Wilson's, which is not empty where all agree, else the bootstrap's.
    digits: round to so many.
    """
    if yes_or_no is None:
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
    """(2,): Wilson's 95 % interval of the mean of values in 0..1, each a yes or no or a mean of some."""
    n, share, z = len(values), values.mean(), 1.96
    center = (share + z ** 2 / (2 * n)) / (1 + z ** 2 / n)
    half = z / (1 + z ** 2 / n) * (share * (1 - share) / n + z ** 2 / (4 * n ** 2)) ** 0.5
    return np.array([center - half, center + half]).clip(0, 1)


# --- what is written ---


def cell(value: dict) -> str:
    """A mean and its interval, as much of it as there is."""
    spread = "" if value["low"] is None else f" ({value['low']:.3f} to {value['high']:.3f})"
    return "-" if value["mean"] is None else f"{value['mean']:.3f}{spread}"


def markdown(results: dict) -> str:
    """The scores as a table."""
    lines = ["| score | good is | value | 95 % | n | the judge itself |", "|---|---|---|---|---|---|"]
    rows = [(name, good, results[name]) for name, (good, _) in SCORES.items()]
    for score, kind in (("activity", "activities"), ("identity", "attributes")):
        at = 1 + [name for name, _, _ in rows].index(score)
        rows[at:at] = [(f"{score}: {name}", "high", value) for name, value in results[kind].items()]
    for name, good, value in rows:
        middle = value.get("mean", value.get("median"))
        cells = ["-" if middle is None else f"{middle:.3f}",
                 "-" if value["low"] is None else f"{value['low']:.3f} to {value['high']:.3f}"]
        judged = f"{value['judge']:.3f}" if value.get("judge") is not None else ""
        lines.append(f"| {name} | {good} | {' | '.join(cells)} | {value['n']} | {judged} |")
    return "\n".join([*lines, "", "The last column is what the judge reaches on held-out renders: its "
                      "accuracy, the mix-ups that it sees where there are none, the IoU of the people that "
                      "it finds. Seconds are medians. See docs/results.md.", ""])


def worst(cases: list[Case]) -> dict[str, list[Case]]:
    """The cases of lowest identity and of highest locality, the worst first."""
    measured = {"identity": [-identity(case.scene, case.readings[1]) for case in cases],
                "locality": [locality(case) for case in cases]}
    return {name: [cases[i] for i in np.argsort([-v for v in values], kind="stable")[:SHOWN]
                   if not np.isnan(values[i])] for name, values in measured.items()}


def describe(case: Case) -> dict:
    """What tells a case apart, and its numbers; `wrong` has one list per person, from the left."""
    reading, local = case.readings[1], locality(case)
    wrong = [[name for place, name, right in attribute_hits(case.scene, reading) if place == k and not right]
             for k in range(len(case.scene.subjects))]
    return {"case": case.number, "prompt": case.scene.caption,
            "identity": identity(case.scene, reading), "locality": None if np.isnan(local) else local,
            "router_iou": router_iou(case), "wrong": wrong}


def draw_sheets(cases: list[Case], router: dict, folder: Path) -> None:
    """Contact sheets and routing maps of the first cases, which are not picked, and of the worst.

    Where no case has a number to be worst by there is no sheet, and an older one is removed.
    """
    from models.load import write_whole
    from toyworld.sheets import case_sheet, plot_router, routing_sheet
    chosen = {"cases": cases[:SHOWN], **{f"worst_{name}": found for name, found in worst(cases).items()}}
    for name, found in chosen.items():
        entries = [(case, *(references_of(scene, case.number, k) for k, scene in
                            enumerate((case.scene, case.other))), describe(case)) for case in found]
        for suffix, sheet in (("", case_sheet), ("_routing", routing_sheet)):
            path = folder / f"{name}{suffix}.png"
            if entries:
                picture = sheet(entries)
                write_whole(path, lambda temporary, picture=picture: picture.save(temporary, format="PNG"))
            else:
                path.unlink(missing_ok=True)
    plot_router(router, folder / "router.png")


if __name__ == "__main__":
    main()
