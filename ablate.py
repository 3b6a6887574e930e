"""Train and measure a variant of MoA in the small world: what is each part good for?

    python ablate.py --list
    python ablate.py no-router-loss --seed 0          # one row: train, evaluate
    python ablate.py --all --jobs 4                   # every row with three seeds, in the background
    python ablate.py --table                          # what is there by now, as Markdown and plots

All rows have the same budget, data and evaluation, and differ in one thing, which is an edit of a module
below: copy a row to try an idea of your own. What is done is skipped and what was stopped goes on, so a
night can be spent in pieces. A row's folder holds its run and `results.json` of evaluate.py.
"""
import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

from command import fail

ROOT = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
STEPS, BATCH_SIZE, CASES = 1250, 36, 64  # 45,000 pictures, 40 minutes on one core
DECODER = range(7, 16)  # transformer blocks behind the middle one, l = 6


@dataclass(frozen=True)
class Row:
    """One variant: what is other than in the method."""

    what: str
    config: dict = field(default_factory=dict)  # of the TrainConfig
    edits: tuple[Callable, ...] = ()  # context managers
    evaluation: dict = field(default_factory=dict)  # flags of evaluate.py
    trained_by: str | None = None  # another row, whose weights are evaluated in another way


# --- edits: inside, the method is another one, in training and in drawing ---


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Inside, an attribute is another one."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def fixed_routing(personalized: Callable[[int, str], float | None]) -> Iterator[None]:
    """Layers whose router is a constant: `personalized(l, kind)` is its weight, None a learned one."""
    import moa.install
    import stages.moa
    add_moa = moa.install.add_moa

    def add(unet, router_hidden=None):
        add_moa(unet, router_hidden)
        for layer, kind, mixture in moa.install.moa_layers(unet):
            weight = personalized(layer, kind)
            if weight is not None:
                fix(mixture.router, weight)
        return unet

    with replaced(moa.install, "add_moa", add), replaced(stages.moa, "add_moa", add):
        yield


def fix(router, weight: float) -> None:
    """Make a router's own weights a constant, which its MoA file then holds."""
    import torch
    router.f.requires_grad_(False)
    last = router.f[-1] if isinstance(router.f, torch.nn.Sequential) else router.f
    last.weight.zero_()
    last.bias.copy_(torch.tensor([1 - weight, weight]).clamp(min=1e-13).log())  # about 30, as for fp16


@contextmanager
def router_width(hidden: int) -> Iterator[None]:
    """Routers with a hidden layer."""
    import stages.moa
    add_moa = stages.moa.add_moa
    with replaced(stages.moa, "add_moa", lambda unet: add_moa(unet, hidden)):
        yield  # load_moa reads the width from the file


@contextmanager
def deeper_routers(hidden: int) -> Iterator[None]:
    """Routers with two hidden layers."""
    import moa.install
    import stages.moa
    import torch.nn as nn
    add_moa = moa.install.add_moa

    def add(unet, router_hidden=None):
        add_moa(unet, hidden)
        for _, _, mixture in moa.install.moa_layers(unet):
            first, act, last = mixture.router.f
            mixture.router.f = nn.Sequential(
                first, act, nn.Linear(hidden, hidden).to(last.weight), nn.GELU(), last)
        return unet

    with replaced(moa.install, "add_moa", add), replaced(stages.moa, "add_moa", add):
        yield


@contextmanager
def no_encoding() -> Iterator[None]:
    """The same token at every timestep and in every layer: PE(t, l) is a constant."""
    from moa.prompt import PositionalEncoding
    forward = PositionalEncoding.forward
    with replaced(PositionalEncoding, "forward", lambda self, t, layers: 0 * forward(self, t, layers)):
        yield


@contextmanager
def mean_router_loss() -> Iterator[None]:
    """Eq. 9 as a mean over the pixels, as the masked loss is, not as a sum."""
    import stages.moa
    router_loss = stages.moa.router_loss
    with replaced(stages.moa, "router_loss",
                  lambda routing, mask: router_loss(routing, mask) / mask[0].numel()):
        yield


# Pairs of attributes that `unseen-pairs` never shows together; each alone it does.
UNSEEN = ((("hair_color", "red"), ("glasses", "yes")), (("shirt_color", "blue"), ("pattern", "stripes")),
          (("bottom", "skirt"), ("bottom_color", "red")))


def has_unseen_pair(person) -> bool:
    """Does a `toyworld.Identity` have both attributes of a pair in UNSEEN?"""
    return any(all(getattr(person, name) == value for name, value in pair) for pair in UNSEEN)


@contextmanager
def without_unseen_pairs() -> Iterator[None]:
    """Training skips the scenes in which somebody has such a pair."""
    from functools import cache

    import numpy as np

    import stages.stage
    from data import toyworld
    batch_indices = stages.stage.batch_indices

    @cache
    def allowed(count: int) -> np.ndarray:
        return np.array([seed for seed in range(count) if not any(
            has_unseen_pair(subject.identity) for subject in toyworld.sample_scene(seed).subjects)])

    with replaced(stages.stage, "batch_indices", lambda seed, step, size, count:
                  allowed(count)[batch_indices(seed, step, size, len(allowed(count)))]):
        yield


def only(chosen: Callable[[int, str], bool]) -> Callable:
    """An edit: MoA in the chosen layers, in the others the prior."""
    return lambda: fixed_routing(lambda layer, kind: None if chosen(layer, kind) else 0.0)


# FastComposer (arXiv 2305.10431): one branch that is trained, at all timesteps, half of the samples with
# the whole loss; a person enters late ("delayed subject conditioning").
FINETUNED = {"edits": (lambda: fixed_routing(lambda layer, kind: 1.0),), "evaluation": {"prior-above": 1000}}
ROWS = {
    "moa": Row("the method as shipped"),
    "one-branch": Row("no MoA: all attention finetuned, FastComposer's losses",
                      {"masked_probability": 0.5, "lambda_router": 0.0, "max_timestep": 1000}, **FINETUNED),
    **{f"one-branch-{t}": Row(f"the same, the people enter below t = {t}", edits=FINETUNED["edits"],
                              evaluation={"prior-above": 1000, "start": t}, trained_by="one-branch")
       for t in (800, 600, 400)},
    "people-only": Row("only the people of every sample count, as in the paper", {"masked_probability": 1.0}),
    "no-encoding": Row("no conditioning on (t, l)", edits=(no_encoding,)),
    "no-router-loss": Row("without Eq. 9", {"lambda_router": 0.0}),
    "people-only-no-router-loss": Row("the paper's masked loss, without Eq. 9",
                                      {"masked_probability": 1.0, "lambda_router": 0.0}),
    "mean-router-loss": Row("Eq. 9 as a mean over the pixels", edits=(mean_router_loss,)),
    "no-object-loss": Row("without Eq. 12", {"lambda_object": 0.0}),
    "router-16": Row("routers with a hidden layer of 16", edits=(lambda: router_width(16),)),
    "router-64": Row("routers with a hidden layer of 64", edits=(lambda: router_width(64),)),
    "router-deep": Row("routers with two hidden layers of 16", edits=(lambda: deeper_routers(16),)),
    "cross-only": Row("MoA in cross-attention only", edits=(only(lambda layer, kind: kind == "cross"),)),
    "self-only": Row("MoA in self-attention only", edits=(only(lambda layer, kind: kind == "self"),)),
    "decoder-only": Row("MoA in the decoder only", edits=(only(lambda layer, kind: layer in DECODER),)),
    "every-second": Row("MoA in every second block", edits=(only(lambda layer, kind: layer % 2 == 0),)),
    "half": Row("half the training", {"steps": STEPS // 2}),
    "double": Row("twice the training", {"steps": 2 * STEPS}),
    "unseen-pairs": Row("trained without three pairs of attributes: see bench/generalization.py",
                        edits=(without_unseen_pairs,)),
}
COLUMNS = ("identity", "mixup", "context", "activity", "locality", "prior_agreement", "router_iou", "variety")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("row", nargs="?", choices=ROWS, metavar="ROW", help="train and evaluate this one")
    what.add_argument("--list", action="store_true", help="what the rows are")
    what.add_argument("--all", action="store_true", help="all rows with all seeds that are not there")
    what.add_argument("--table", action="store_true", help="print what is there; plots beside it")
    add("--output", type=Path, default=Path("runs/ablations"), metavar="FOLDER",
        help="of all rows' folders (default runs/ablations)")
    add("--seed", type=int, default=0, help="of the training (default 0)")
    add("--jobs", type=int, default=1, metavar="N", help="rows at the same time, one core each (default 1)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file: give a folder's name")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.list:
        for name, row in ROWS.items():
            print(f"{name:28}{row.what}")
    elif args.table:
        print(table(args.output))
    elif args.all:
        run_all(args.output, args.jobs)
    else:
        run(args.row, args.seed, args.output)


def place(output: Path, name: str, seed: int) -> Path:
    return output / name / f"seed-{seed}"


def run(name: str, seed: int, output: Path) -> None:
    """Train and evaluate one row, or go on with it."""
    import evaluate
    import train
    row, folder = ROWS[name], place(output, name, seed)
    if (folder / "results.json").exists():
        return
    trained = place(output, row.trained_by or name, seed)
    weights = trained / "moa.safetensors"
    with ExitStack() as stack:
        for edit in row.edits:
            stack.enter_context(edit())
        if row.trained_by is None and not weights.exists():
            stack.enter_context(preset(row.config))
            resume = ["--resume"] if train.list_checkpoints(trained) else []
            stack.enter_context(replaced(sys, "argv", [
                "train.py", "moa", "--weights", str(ROOT / "weights" / "toyworld"), "--output", str(trained),
                "--seed", str(seed), "--batch-size", str(BATCH_SIZE), "--checkpoint-every", "250", *resume]))
            train.main()
        if not weights.exists():
            fail(f"{weights} is not there: run the row {row.trained_by} first")
        flags = [word for key, value in row.evaluation.items() for word in (f"--{key}", str(value))]
        evaluate.main(["--weights", str(trained), "--output", str(folder), "--count", str(CASES), *flags])


@contextmanager
def preset(config: dict) -> Iterator[None]:
    """Inside, the small world's preset of `moa` has these values."""
    from dataclasses import replace

    from stages.presets import PRESETS
    before = PRESETS["toyworld"]
    PRESETS["toyworld"] = {**before, "moa": replace(before["moa"], **{"steps": STEPS, **config})}
    try:
        yield
    finally:
        PRESETS["toyworld"] = before


def run_all(output: Path, jobs: int) -> None:
    """Every row with every seed, `jobs` at a time, those that others need first; logs beside the runs."""
    from tqdm import tqdm
    output.mkdir(parents=True, exist_ok=True)
    prepare_data()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def one(job: tuple[str, int]) -> None:
        name, seed = job
        command = [sys.executable, str(ROOT / "ablate.py"), name, "--seed", str(seed),
                   "--output", str(output)]
        with open(output / f"{name}-{seed}.log", "a") as log:
            failed = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        done = (place(output, name, seed) / "results.json").exists()  # else it was stopped
        tqdm.write(f"{name}, seed {seed}: " + (f"failed, see {log.name}" if failed or not done else "done"))

    for again in (False, True):
        todo = [(name, seed) for seed in SEEDS for name, row in ROWS.items() if bool(row.trained_by) == again
                and not (place(output, name, seed) / "results.json").exists()]
        with ThreadPoolExecutor(jobs) as pool:
            list(tqdm(pool.map(one, todo), "ablations", len(todo), unit="row", disable=None))


def prepare_data() -> None:
    """Render and encode what all rows train on, which each would do by itself otherwise."""
    from pipeline import pick_device
    from stages import STAGES, make_config
    STAGES["moa"](make_config("toyworld", "moa"), 0, pick_device("auto"), ROOT / "weights" / "toyworld",
                  None).prepare()


def table(output: Path) -> str:
    """Means of the rows that are there, in brackets the lowest and highest seed or, of a row with one seed,
    the interval over its cases; writes tradeoff.png."""
    import json
    lines = ["| row | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    points = {}
    for name, row in ROWS.items():
        files = [place(output, name, seed) / "results.json" for seed in SEEDS]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if found:
            scores = {c: [result[c] for result in found if result[c]["n"]] for c in COLUMNS}
            lines.append(f"| `{name}`: {row.what} | {len(found)} | "
                         + " | ".join(map(cell, scores.values())) + " |")
            points[name] = {c: [result[c]["mean"] if result[c]["n"] else nan for result in found]
                            for c in COLUMNS}
    if not points:
        fail(f"there is no result in {output}: run a row first")
    plot(points, output / "tradeoff.png")
    return "\n".join(lines)


def cell(scores: list[dict]) -> str:
    """One score of all seeds of a row, as the table shows it."""
    means = [score["mean"] for score in scores]
    ends = means if len(means) > 1 else [score[end] for score in scores for end in ("low", "high")
                                         if end in score]
    spread = f" ({min(ends):.3f} to {max(ends):.3f})" if ends else ""
    return f"{sum(means) / len(means):.3f}{spread}" if means else "-"


def plot(points: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Identity against what is kept of the prior's picture, a mark for each seed of each row."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name} is not drawn: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), dpi=100, sharey=True, layout="constrained")
    labels = {"locality": "locality: change outside / inside the people (low is good)",
              "prior_agreement": "agreement with the prior's layout (high is good)"}
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for k, (name, means) in enumerate(points.items()):
            # A swap that changes the people less than the rest has no place to speak of: not shown.
            x = [nan if column == "locality" and value > 1 else value for value in means[column]]
            axes.plot(x, means["identity"], "os^Dv<>"[k % 7] + "-", linewidth=0.7, color=f"C{k % 10}",
                      alpha=0.8, label=name)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="identity: attributes read right (high is good)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
