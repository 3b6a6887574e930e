"""Measure what Mixture-of-Attention does in the small world, where every identity is known.

    python evaluate.py --output runs/evaluation

Each case is a held-out prompt and seed, drawn three times: by the prior alone, with held-out subjects,
and with other subjects of the same nouns. A judge that was trained on rendered pictures only reads
the pictures. Cases, seeds and subjects are fixed by their number; nothing is picked. Writes
results.json, results.md and contact sheets of the first cases.
"""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

SHIPPED = Path(__file__).resolve().parent / "weights" / "toyworld"
BATCH = 16
SEEDS = 4  # per case in `variety`, which a sixteenth of the cases is enough for
DILATION = 9  # pixels that a person's mask is widened by before "outside" begins


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, type=Path, help="folder for results and sheets")
    add("--weights", type=Path, default=SHIPPED, help="default: the small world")
    add("--moa", type=Path, help="default: moa.safetensors in the weights folder")
    add("--judge", type=Path, help="default: judge.safetensors in the weights folder")
    add("--count", type=int, default=256, help="cases (default 256)")
    add("--steps", type=int, default=20, help="sampling steps (default 20)")
    add("--guidance-scale", type=float, help="default: the weights'")
    add("--prior-above", type=int, default=800,
        help="the prior draws alone from this timestep on (default 800)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default auto)")
    args = parser.parse_args()
    if args.count < 2:
        parser.error(f"--count must be at least 2, not {args.count}")
    return args


def main() -> None:
    args = parse_args()
    from models import WeightsError
    try:
        run(args)
    except (ValueError, WeightsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    """Draw all cases, read them, write scores and sheets."""
    import torch

    from data.judge import Judge
    from models.load import check_exact, read_tensors, write_json
    from pipeline import Pipeline, pick_device

    args.output.mkdir(parents=True, exist_ok=True)
    moa = args.moa or args.weights / "moa.safetensors"
    pipeline = Pipeline.load(args.weights, moa, pick_device(args.device))
    judge, path = Judge(), args.judge or args.weights / "judge.safetensors"
    state = {k: v.float() for k, v in read_tensors(path).items()}
    check_exact(state, judge.state_dict(), path)
    judge.load_state_dict(state)
    judge.eval().to(pipeline.device)
    scale = args.guidance_scale or pipeline.models.config["sampling"]["guidance_scale"]
    with torch.no_grad():
        drawn = [draw(pipeline, judge, range(first, min(first + BATCH, args.count)), args.steps, scale,
                      args.prior_above) for first in progress(range(0, args.count, BATCH))]
        cases = [case for batch in drawn for case in batch]
        results = scores(cases, judge_accuracy(judge, pipeline.device))
        results["variety"] = interval(variety(
            pipeline, max(1, args.count // 16), steps=args.steps, guidance_scale=scale,
            prior_above=args.prior_above))
    settings = {"count": args.count, "steps": args.steps, "guidance_scale": scale,
                "prior_above": args.prior_above, "weights": args.weights.resolve().name}
    write_json({"settings": settings, **results}, args.output / "results.json")
    table = markdown(results)
    (args.output / "results.md").write_text(table, encoding="utf-8")
    sheets(cases, args.output)
    print(table)


def progress(batches):
    from tqdm import tqdm
    return tqdm(batches, "drawing", unit="batch")


@dataclass
class Reading:
    """What the judge reads off one picture."""

    activity: int
    context: int
    count: int  # people
    attributes: dict  # name -> class index per person, from left to right
    people: "object"  # (S, S) bool, where the people are


@dataclass
class Case:
    """One prompt and seed: subjects, pictures and readings of the prior and of two castings."""

    scene: "object"  # data.toyworld.Scene of the first casting
    other: "object"  # of the second
    references: "object"  # (people, S, S, 3) uint8, the first casting's
    pictures: "object"  # (3, S, S, 3) uint8: prior, first, second casting
    readings: list  # three Readings
    routing: "object"  # (h, w) mean weight of the personalized experts, first casting


def cast(number: int):
    """The two castings of a case: test identities and a prompt that training never saw with them."""
    import numpy as np

    from data import toyworld
    plan = toyworld.sample_scene(1_000_000 + number, "test")
    rng = np.random.default_rng([number, 20240416])
    castings = [[toyworld.sample_identity(rng, "test", subject.identity.noun) for subject in plan.subjects]
                for _ in range(2)]
    return [toyworld.compose_scene(number, people, plan.activity, plan.context) for people in castings]


def draw(pipeline, judge, numbers, steps: int, scale: float, prior_above: int) -> list[Case]:
    """Draw a batch of cases and have them read."""
    import numpy as np

    from moa import record_routing
    from pictures import to_uint8
    castings = [cast(number) for number in numbers]
    prompts = [first.caption for first, _ in castings]
    seeds = [7_000_000 + number for number in numbers]
    pictures, readings, references, maps = [], [], [], []
    for casting in (None, 0, 1):
        people = None
        if casting is not None:
            photos = [references_of(scenes[casting], number, casting)
                      for number, scenes in zip(numbers, castings, strict=True)]
            people = [subjects_of(pipeline, scenes[casting], p)
                      for scenes, p in zip(castings, photos, strict=True)]
            references = references or photos
        with record_routing(pipeline.models.unet) as routing:
            collect = collector(routing, maps) if casting == 0 else None
            images = pipeline.generate(prompts, seeds, people, steps=steps, guidance_scale=scale,
                                       prior_only=casting is None, prior_above=prior_above,
                                       progress=collect)
        pictures.append(to_uint8(images))
        readings.append(read(judge, images.to(pipeline.device)))
    routing = sum(maps) / len(maps)  # mean over layers and steps
    return [Case(*castings[i], references[i], np.stack([p[i] for p in pictures]),
                 [r[i] for r in readings], routing[i]) for i in range(len(numbers))]


def references_of(scene, number: int, casting: int):
    """(people, S, S, 3) uint8: pictures of a scene's subjects, in another pose."""
    import numpy as np

    from data import toyworld
    return np.stack([toyworld.render_reference(s.identity, 10 * number + casting) for s in scene.subjects])


def subjects_of(pipeline, scene, photos) -> list:
    """The subjects of a scene for `Pipeline.generate`."""
    from pictures import to_picture
    from pipeline import Subject
    features = pipeline.encode_subjects(to_picture(photos) / 2 + 0.5)
    places = [len(pipeline.models.tokenize.encode(scene.caption[:s.end])) for s in scene.subjects]
    return [Subject(p, f) for p, f in zip(places, features, strict=True)]


def variety(pipeline, count: int, **options) -> list[float]:
    """How much a case's pictures differ over `SEEDS` seeds, relative to how much the prior's do.

    Mean absolute difference of pixels over all pairs of seeds, with the case's subjects over without;
    1 keeps the prior's variety, 0 draws the same picture again and again. One number per case.
    """
    import torch
    ratios = []
    for number in range(count):
        scene = cast(number)[0]
        people = [subjects_of(pipeline, scene, references_of(scene, number, 0))] * SEEDS
        seeds = [8_000_000 + SEEDS * number + k for k in range(SEEDS)]
        distances = [torch.pdist(pipeline.generate([scene.caption] * SEEDS, seeds, people, prior_only=prior,
                                                   **options).flatten(1), p=1).mean()
                     for prior in (False, True)]
        ratios.append(float(distances[0] / distances[1]))
    return ratios


def background_distance(case: Case) -> float:
    """Mean absolute difference to the prior's picture outside both pictures' people, in 0..1."""
    import numpy as np
    outside = ~(widened(case.readings[0].people) | widened(case.readings[1].people))
    change = np.abs(case.pictures[1].astype(int) - case.pictures[0]).mean(-1) / 255
    return float(change[outside].mean()) if outside.any() else float("nan")


def widened(people):
    """(S, S) bool mask of people and of `DILATION` pixels around them."""
    import numpy as np
    from PIL import Image, ImageFilter
    return np.array(Image.fromarray(people).convert("L").filter(ImageFilter.MaxFilter(DILATION))) > 0


def collector(routing: dict, maps: list):
    """A progress callback that keeps the layers' mean routing map of each step: (B, h, w)."""
    from moa.loss import mean_routing

    def collect(step, steps, t, x0):
        if routing:
            prior = mean_routing([r[-len(x0):, :, 0] for r in routing.values()], *x0.shape[-2:])
            maps.append(1 - prior.cpu().numpy())
            routing.clear()
    return collect


def read(judge, images) -> list[Reading]:
    """Have the judge read (B, 3, S, S) pictures."""
    import torch.nn.functional as F
    verdict = judge(images)
    people = F.interpolate(verdict.people.softmax(1), images.shape[-2:], mode="bilinear")[:, 0] < 0.5
    attributes = {name: logits.argmax(-1).tolist() for name, logits in verdict.attributes.items()}
    return [Reading(int(verdict.activity[i].argmax()), int(verdict.context[i].argmax()),
                    int(verdict.count[i].argmax()) + 1, {k: v[i] for k, v in attributes.items()},
                    people[i].cpu().numpy()) for i in range(len(images))]


def judge_accuracy(judge, device, count: int = 400) -> dict[str, float]:
    """The judge's accuracy on held-out renders, the ceiling of every score that it gives."""
    import numpy as np

    from data import toyworld
    from pictures import to_picture
    hits = {"activity": [], "context": [], "identity": []}
    for first in range(0, count, 50):
        scenes = [toyworld.sample_scene(2_000_000 + k, "test") for k in range(first, first + 50)]
        images = np.stack([toyworld.render_scene(scene)[0] for scene in scenes])
        for scene, reading in zip(scenes, read(judge, to_picture(images).to(device)), strict=True):
            hits["activity"].append(toyworld.ACTIVITIES[reading.activity] == scene.activity)
            hits["context"].append(toyworld.CONTEXTS[reading.context] == scene.context)
            hits["identity"] += [right for _, right in attribute_hits(scene, reading)]
    return {name: float(np.mean(values)) for name, values in hits.items()}


def attribute_hits(scene, reading: Reading) -> list[tuple[str, bool]]:
    """(attribute, read right) of every visible attribute of every subject of a scene."""
    from data import toyworld
    hits = []
    for place, subject in enumerate(scene.subjects):
        labels = toyworld.attribute_labels(subject.identity)
        hits += [(name, reading.attributes[name][place] == labels[name]) for name in subject.visible]
    return hits


def mixups(scene, reading: Reading) -> list[bool]:
    """Of the attributes in which two subjects differ: was the other one's value read?"""
    from data import toyworld
    if len(scene.subjects) < 2:
        return []
    labels = [toyworld.attribute_labels(subject.identity) for subject in scene.subjects]
    return [reading.attributes[name][place] == labels[1 - place][name]
            for place, subject in enumerate(scene.subjects) for name in subject.visible
            if labels[0][name] != labels[1][name]]


def locality(case: Case) -> float:
    """Mean change of pixels outside the people over that inside, between the two castings."""
    import numpy as np
    change = np.abs(case.pictures[1].astype(int) - case.pictures[2]).mean(-1)
    people = case.readings[1].people | case.readings[2].people
    wide = widened(people)
    if not people.any() or wide.all():
        return float("nan")
    return float(change[~wide].mean() / max(change[people].mean(), 1e-6))


def router_iou(case: Case) -> float:
    """Overlap of the people with the mean routing map, thresholded halfway between its extremes."""
    import numpy as np
    from PIL import Image
    people = np.array(Image.fromarray(case.readings[1].people).convert("L").resize(
        case.routing.shape[::-1], Image.Resampling.BOX)) > 127
    found = case.routing > (case.routing.min() + case.routing.max()) / 2
    return float((found & people).sum() / max((found | people).sum(), 1))


def overlap(case: Case) -> float:
    """IoU of the people's masks in the prior's picture and in the personalized one."""
    a, b = case.readings[0].people, case.readings[1].people
    return float((a & b).sum() / max((a | b).sum(), 1))


def scores(cases: list[Case], ceiling: dict[str, float]) -> dict:
    """All scores, each with its mean, 95 % bootstrap interval and number of cases."""
    import numpy as np

    from data import toyworld

    def right(field, names, which):
        return [names[getattr(c.readings[which], field)] == getattr(c.scene, field) for c in cases]

    def identity(which):
        return [np.mean([hit for _, hit in attribute_hits(c.scene, c.readings[which])]) for c in cases]

    values = {
        "prior_context": right("context", toyworld.CONTEXTS, 0),
        "prior_activity": right("activity", toyworld.ACTIVITIES, 0),
        "prior_count": [c.readings[0].count == len(c.scene.subjects) for c in cases],
        "prior_identity": identity(0),  # what chance gives: the prior never saw the subjects
        "context": right("context", toyworld.CONTEXTS, 1),
        "activity": right("activity", toyworld.ACTIVITIES, 1),
        "count": [c.readings[1].count == len(c.scene.subjects) for c in cases],
        "identity": identity(1),
        "locality": [locality(c) for c in cases],
        "mixup": [np.mean(m) for c in cases if (m := mixups(c.scene, c.readings[1]))],
        "router_iou": [router_iou(c) for c in cases],
        "prior_agreement": [overlap(c) for c in cases],
        "background_distance": [background_distance(c) for c in cases]}
    results = {name: interval(value) for name, value in values.items()}
    hits = [hit for c in cases for hit in attribute_hits(c.scene, c.readings[1])]
    results["attributes"] = {name: interval([right for n, right in hits if n == name])
                             for name in toyworld.ATTRIBUTES}
    results["judge"] = ceiling
    return results


def interval(values: list) -> dict[str, float | None]:
    """Mean and 95 % bootstrap interval of the values that are not NaN."""
    import numpy as np
    values = np.array(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):  # no two-person case, say
        return {"mean": None, "low": None, "high": None, "n": 0}
    draws = values[np.random.default_rng(0).integers(len(values), size=(1000, len(values)))].mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def markdown(results: dict) -> str:
    """The scores as a table."""
    lines = ["| score | mean | 95 % | n |", "|---|---|---|---|"]
    rows = {k: v for k, v in results.items() if "mean" in v}
    rows |= {f"identity: {k}": v for k, v in results["attributes"].items()}
    for name, value in rows.items():
        cells = ["-", "-"] if value["n"] == 0 else [
            f"{value['mean']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {value['n']} |")
    ceiling = ", ".join(f"{k} {v:.3f}" for k, v in results["judge"].items())
    return "\n".join([*lines, "", f"The judge itself, on held-out renders: {ceiling}.", ""])


def sheets(cases: list[Case], folder: Path) -> None:
    """The first cases, not picked: subjects, prior, first casting, second casting, routing."""
    import numpy as np
    from PIL import Image
    size = cases[0].pictures.shape[1]
    blank = np.full((size, size, 3), 255, np.uint8)
    rows = []
    for case in cases[:32]:
        subjects = list(case.references) + [blank] * (2 - len(case.references))
        low, high = case.routing.min(), case.routing.max()  # they lie close: show where, not how much
        routing = Image.fromarray(((case.routing - low) / max(high - low, 1e-6) * 255).astype(np.uint8))
        routing = routing.resize((size, size), Image.Resampling.NEAREST).convert("RGB")
        rows.append(np.concatenate([*subjects, *case.pictures, np.array(routing)], axis=1))
    columns = [np.concatenate(rows[i::2]) for i in range(2)]
    height = min(len(c) for c in columns)
    Image.fromarray(np.concatenate([c[:height] for c in columns], axis=1)).save(folder / "cases.png")


if __name__ == "__main__":
    main()
