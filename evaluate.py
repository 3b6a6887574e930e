"""Measure what Mixture-of-Attention does in the small world, where every identity is known.

    python evaluate.py
    python evaluate.py --weights runs/moa --output runs/evaluation_moa

Each case is a held-out prompt and seed, drawn three times: by the prior alone, with held-out subjects,
and with other subjects of the same nouns. A classifier that was trained on rendered pictures only reads
the pictures. Cases, seeds and subjects are fixed by their number; nothing is picked. Writes
results.json, results.md, contact sheets of the first and of the worst cases with their routing maps,
and router.png. What each score means, and what it cannot see, is in docs/results.md.
"""
import argparse
import hashlib
import time
from pathlib import Path

# First: it says what is not installed, and how torch's threads wait.
from models.errors import Parser

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import sample
import toyworld
from models.device import pick_device
from models.load import read_config, write_json, write_whole
from pipeline import Pipeline
from samplers import SAMPLERS, timesteps_of
from toyworld.benchmark import (BATCH, NAMES, RENDERS, SCORES, START, Case, attribute_hits, background_change,
                                classifier_scores, draw_cases, identity, references_of, router_arrays,
                                router_iou, scores, variety)
from toyworld.classifier import Classifier, load_classifier
from toyworld.sheets import case_sheet, plot_router, routing_sheet
from train import git_describe

SHIPPED = Path(__file__).resolve().parent / "weights" / "toyworld"
SHOWN = 16  # cases on each contact sheet


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/evaluation"), metavar="FOLDER",
        help="for results and sheets (default runs/evaluation)")
    add("--weights", type=Path, default=SHIPPED, metavar="FOLDER", help="default: the small world")
    add("--moa", type=Path, metavar="FILE", help="default: moa.safetensors in the weights folder")
    add("--classifier", type=Path, metavar="FILE",
        help="default: classifier.safetensors in the weights folder, or the shipped one")
    add("--count", type=int, default=256, metavar="N", help="how many cases (default 256)")
    add("--first", type=int, default=0, metavar="CASE",
        help="number of the first case; from 256 on nothing was chosen by them (default 0)")
    add("--steps", type=int, default=20, metavar="N", help="sampling steps (default 20)")
    add("--sampler", choices=SAMPLERS, default="unipc", help="default unipc")
    add("--guidance-scale", type=float, metavar="SCALE",
        help="classifier-free guidance; 1 is none (default: the weights')")
    add("--prior-above", type=int, metavar="T",
        help="the base model draws alone at timesteps from T on (default: the weights', or 800)")
    add("--start", type=int, default=START, metavar="T",
        help=f"the subjects are there at timesteps below T (default {START})")
    add("--sparse", type=float, default=0.0, metavar="WEIGHT",
        help="sparse routing: router weights up to this count as 0 (default 0)")
    add("--reuse", action="store_true", help="compute the subjects' self-attention in every second step only")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    sample.execute(run, parse_args(argv))


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Draw all cases, read them, write scores and sheets."""
    begin = time.perf_counter()
    if args.count < 1 or args.first < 0:
        raise ValueError("--count must be at least 1 and --first at least 0")
    args.output.mkdir(parents=True, exist_ok=True)
    fill_in(args)
    timesteps = moa_timesteps(args.sampler, args.steps, args.prior_above)
    pipeline, classifier, files = load(args)
    options = {"steps": args.steps, "guidance_scale": args.guidance_scale, "prior_above": args.prior_above,
               "sparse": args.sparse, "reuse": args.reuse, "sampler": args.sampler}
    settings = {"count": args.count, "first": args.first, **options, "start": args.start,
                "weights": args.weights.resolve().name, "moa": files["moa"].name}
    numbers, cases, seconds = range(args.first, args.first + args.count), [], []
    for done in tqdm(range(0, args.count, BATCH), "drawing", unit="batch"):
        drawn, took = draw_cases(pipeline, classifier, numbers[done:done + BATCH], args.start, **options)
        cases += drawn
        seconds.append(took)
    ceiling = classifier_scores(classifier, count=min(RENDERS, 10 * args.count))
    ratios = variety(pipeline, numbers[:max(1, args.count // 16)], args.start, **options)
    router = router_arrays(cases, timesteps)
    save_sheets(cases, router, args.output)
    found = scores(cases, ratios, seconds, ceiling)
    run_by = {**source(pipeline.device, files), "seconds": round(time.perf_counter() - begin, 1)}
    worst_cases = {name: [summary(case) for case in chosen] for name, chosen in worst(cases).items()}
    write_json({"settings": settings, "run": run_by, **found, "judge": ceiling, "worst": worst_cases,
                "router": router}, args.output / "results.json")
    table = markdown(found)
    write_whole(args.output / "results.md", lambda temporary: temporary.write_text(table, encoding="utf-8"))
    print(table)


def fill_in(args: argparse.Namespace) -> None:
    """Take what the flags leave open from the weights' config.json. Raises ValueError if they are of another
    world."""
    config = read_config(args.weights)
    if config.get("world") != "toyworld" or config.get("image_size") != toyworld.SIZE:
        raise ValueError(f"--weights {args.weights} is not of the small world, the only one whose people "
                         "are known: give its weights, or the folder of a train.py moa run; SD1.5's are for "
                         "bench/faces.py")
    for name, value in {"guidance_scale": 5.0, "prior_above": 800, **config.get("sampling", {})}.items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)


def moa_timesteps(sampler: str, steps: int, prior_above: int) -> list[int]:
    """The timesteps at which MoA draws, falling. Raises ValueError where there are none."""
    below = [t for t in timesteps_of(SAMPLERS[sampler], steps) if t < prior_above]
    if not below:
        raise ValueError(f"nothing is left to MoA: none of the timesteps of {steps} steps lies below "
                         f"{prior_above}; give more --steps, or another --prior-above")
    return below


def load(args: argparse.Namespace) -> tuple[Pipeline, Classifier, dict[str, Path]]:
    """The pipeline, the classifier and the files that they come from. Raises ValueError."""
    own = args.weights / "classifier.safetensors"
    files = {part: args.weights / f"{part}.safetensors"
             for part in ("unet", "vae", "text_encoder", "image_encoder")}
    files["moa"] = args.moa or args.weights / "moa.safetensors"
    files["judge"] = args.classifier or (own if own.is_file() else SHIPPED / own.name)
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"{path} not found, which the evaluation needs")
    pipeline = Pipeline.load(args.weights, files["moa"], pick_device(args.device))
    return pipeline, load_classifier(files["judge"], pipeline.device), files


def source(device: torch.device, files: dict[str, Path]) -> dict:
    """What results come from: code, torch, device, threads, and the checksums of the weights' `files`."""
    return {"code": git_describe(), "torch": torch.__version__, "device": device_name(device),
            "threads": torch.get_num_threads(),
            "sha256": {name: checksum(path) for name, path in files.items()}}


def checksum(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()[:16]


def device_name(device: torch.device) -> str:
    """cpu, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# --- what is written ---


def cell(value: dict) -> str:
    """A mean and its interval, as much of it as there is."""
    spread = "" if value["low"] is None else f" ({value['low']:.3f} to {value['high']:.3f})"
    return "-" if value["mean"] is None else f"{value['mean']:.3f}{spread}"


def label(score: str) -> str:
    """A score's name as people read it: `locality` is a background change, `prior_mixup` one of the prior."""
    prefix = "prior_" if score.startswith("prior_") and score.removeprefix("prior_") in NAMES else ""
    return prefix.replace("_", " ") + NAMES.get(score.removeprefix(prefix), score)


def markdown(results: dict) -> str:
    """The scores as a table."""
    lines = ["| score | good is | value | 95 % | n | the classifier itself |", "|---|---|---|---|---|---|"]
    rows = [(label(name), good, results[name]) for name, (good, _) in SCORES.items()]
    for score, kind in (("activity", "activities"), ("identity", "attributes")):
        at = 1 + [name for name, _, _ in rows].index(score)
        rows[at:at] = [(f"{score}: {name}", "high", value) for name, value in results[kind].items()]
    for name, good, value in rows:
        middle = value.get("mean", value.get("median"))
        cells = ["-" if middle is None else f"{middle:.3f}",
                 "-" if value["low"] is None else f"{value['low']:.3f} to {value['high']:.3f}"]
        own = f"{value['judge']:.3f}" if value.get("judge") is not None else ""
        lines.append(f"| {name} | {good} | {' | '.join(cells)} | {value['n']} | {own} |")
    return "\n".join([*lines, "", "The last column is what the classifier reaches on held-out renders: its "
                      "accuracy, the mix-ups that it sees where there are none, the IoU of the people that "
                      "it finds. Seconds are medians. See docs/results.md.", ""])


def worst(cases: list[Case]) -> dict[str, list[Case]]:
    """The cases of lowest identity and of highest background change, the worst first."""
    measured = {"identity": [-identity(case.scene, case.readings[1]) for case in cases],
                "locality": [background_change(case) for case in cases]}
    return {name: [cases[i] for i in np.argsort([-v for v in values], kind="stable")[:SHOWN]
                   if not np.isnan(values[i])] for name, values in measured.items()}


def summary(case: Case) -> dict:
    """What tells a case apart, and its numbers; `wrong` has one list per person, from the left."""
    reading, change = case.readings[1], background_change(case)
    hits = attribute_hits(case.scene, reading)
    wrong = [[name for number, name, right in hits if number == k and not right]
             for k in range(len(case.scene.subjects))]
    return {"case": case.number, "prompt": case.scene.caption,
            "identity": identity(case.scene, reading), "locality": None if np.isnan(change) else change,
            "router_iou": router_iou(case), "wrong": wrong}


def save_sheets(cases: list[Case], router: dict, folder: Path) -> None:
    """Contact sheets and routing maps of the first cases, which are not picked, and of the worst.

    Where no case has a number to be worst by there is no sheet, and an older one is removed.
    """
    chosen = {"cases": cases[:SHOWN], **{f"worst_{name}": found for name, found in worst(cases).items()}}
    for name, found in chosen.items():
        entries = [(case, *(references_of(scene, case.number, k) for k, scene in
                            enumerate((case.scene, case.other))), summary(case)) for case in found]
        for suffix, sheet in (("", case_sheet), ("_routing", routing_sheet)):
            path = folder / f"{name}{suffix}.png"
            if entries:
                save(sheet(entries), path)
            else:
                path.unlink(missing_ok=True)
    plot_router(router, folder / "router.png")


def save(picture: Image.Image, path: Path) -> None:
    """A sheet as PNG."""
    write_whole(path, lambda temporary: picture.save(temporary, format="PNG"))


if __name__ == "__main__":
    main()
