"""Train and measure a variant of MoA in the small world: what is each part good for?

    python ablate.py --list
    python ablate.py no-router-loss --seed 0          # one experiment: train, evaluate
    python ablate.py --all --jobs 4                   # all experiments with three seeds
    python ablate.py --table                          # what is there by now, as Markdown and a plot

All experiments have the same budget, data and evaluation, and differ in one thing: other values of the
preset, or an edit of a module. Copy one below to try an idea of your own. What is done is skipped and what
was stopped goes on, so a night can be spent in pieces. An experiment's folder holds its run and evaluate.py's
results.json, which names the commit; after another edit under the same name, remove the folder.
"""
import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

# First: it says what is not installed, and how torch's threads wait.
from models.errors import Parser, fail

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import evaluate
import moa.checkpoint
import moa.loss
import moa.prompt
import toyworld
import train
import training.moa
import training.stage
from data.sample import ENCODED
from moa import MixtureOfAttention, moa_layers
from models.device import pick_device
from toyworld.benchmark import FEWEST
from toyworld.rendered import render_cache

SEEDS = (0, 1, 2)
STEPS, BATCH_SIZE, CASES = 1250, 36, 64  # 45,000 pictures, 40 minutes on one core
PRIOR, PERSONALIZED = 0, 1


@dataclass(frozen=True)
class Experiment:
    """What is other than in the method."""

    what: str
    config: dict = field(default_factory=dict)  # of the TrainConfig
    edit: Callable[[], AbstractContextManager] = nullcontext  # inside, the method is another one
    evaluation: dict = field(default_factory=dict)  # flags of evaluate.py
    trained_by: str | None = None  # another experiment, whose weights are evaluated in another way


# --- edits ---


@contextmanager
def changed_moa(change: Callable[[nn.Module], None], hidden: int | None = None) -> Iterator[None]:
    """`change` is called with the UNet once it has MoA, in training and where a file is loaded; its routers
    have a hidden layer of `hidden`, if it is given."""
    add_moa = moa.add_moa

    def add(unet: nn.Module, router_hidden: int | None = None) -> nn.Module:
        change(add_moa(unet, hidden or router_hidden))
        return unet

    with patch.object(training.moa, "add_moa", add), patch.object(moa.checkpoint, "add_moa", add):
        yield


def only(chosen: Callable[[int, str], bool], otherwise: int = PRIOR) -> AbstractContextManager:
    """Routers where `chosen(l, kind)`; in all other layers one expert has all the weight."""
    def change(unet: nn.Module) -> None:
        for layer, kind, mixture in moa_layers(unet):
            if not chosen(layer, kind):
                fix(mixture, otherwise)

    return changed_moa(change)


def fix(mixture: MixtureOfAttention, expert: int) -> None:
    """Make a router a constant, which its MoA file then holds."""
    mixture.router.f.requires_grad_(False).weight.zero_()
    mixture.router.f.bias.fill_(-30)[expert] = 30  # the other's weight: 1e-26


def one_branch() -> AbstractContextManager:
    """No mixture: the personalized expert alone."""
    return only(lambda layer, kind: False, otherwise=PERSONALIZED)


def router_width(hidden: int) -> AbstractContextManager:
    """Routers with a hidden layer."""
    return changed_moa(lambda unet: None, hidden)


def deeper_routers(hidden: int) -> AbstractContextManager:
    """Routers with two hidden layers."""
    def change(unet: nn.Module) -> None:
        for _, _, mixture in moa_layers(unet):
            first, act, last = mixture.router.f
            second = nn.Linear(hidden, hidden).to(last.weight)
            mixture.router.f = nn.Sequential(first, act, second, nn.GELU(), last)

    return changed_moa(change, hidden)


def no_encoding() -> AbstractContextManager:
    """The same token at every timestep and in every layer: PE(t, l) is a constant."""
    forward = moa.prompt.PositionalEncoding.forward
    return patch.object(moa.prompt.PositionalEncoding, "forward",
                        lambda self, t, layers: 0 * forward(self, t, layers))


def mean_router_loss() -> AbstractContextManager:
    """Eq. 9 as a mean over the pixels, as the masked loss is, not as a sum."""
    router_loss = moa.loss.router_loss
    return patch.object(moa.loss, "router_loss",
                        lambda routing, mask: router_loss(routing, mask) / mask[0].numel())


# Pairs of attributes that `unseen-pairs` never shows together; each alone it does.
UNSEEN = ((("hair_color", "red"), ("glasses", "yes")), (("shirt_color", "blue"), ("pattern", "stripes")),
          (("bottom", "skirt"), ("bottom_color", "red")))


def has_unseen_pair(person: toyworld.Identity) -> bool:
    """Does somebody have both attributes of a pair in UNSEEN?"""
    return any(all(getattr(person, name) == value for name, value in pair) for pair in UNSEEN)


def without_unseen_pairs() -> AbstractContextManager:
    """Training skips the scenes in which somebody has such a pair."""
    batch_indices = training.stage.batch_indices

    @cache
    def allowed(count: int) -> np.ndarray:
        return np.array([seed for seed in range(count) if not any(
            has_unseen_pair(subject.identity) for subject in toyworld.sample_scene(seed).subjects)])

    return patch.object(training.stage, "batch_indices", lambda seed, step, size, count:
                        allowed(count)[batch_indices(seed, step, size, len(allowed(count)))])


# `one-branch` is FastComposer (arXiv 2305.10431): all timesteps, half of the samples with the whole loss; in
# those that follow it a person enters late ("delayed subject conditioning").
EXPERIMENTS = {
    "moa": Experiment("the method as shipped"),
    "one-branch": Experiment("no MoA: all attention finetuned, FastComposer's losses",
                             {"masked_probability": 0.5, "lambda_router": 0.0, "max_timestep": 1000},
                             one_branch, {"prior-above": 1000}),
    **{f"one-branch-{t}": Experiment(f"the same, the people enter below t = {t}", edit=one_branch,
                                     evaluation={"prior-above": 1000, "start": t}, trained_by="one-branch")
       for t in (800, 600, 400)},
    "people-only": Experiment("only the people of every sample count, as in the paper",
                              {"masked_probability": 1.0}),
    "no-encoding": Experiment("no conditioning on (t, l)", edit=no_encoding),
    "no-router-loss": Experiment("without Eq. 9", {"lambda_router": 0.0}),
    "people-only-no-router-loss": Experiment("the paper's masked loss, without Eq. 9",
                                             {"masked_probability": 1.0, "lambda_router": 0.0}),
    "mean-router-loss": Experiment("Eq. 9 as a mean over the pixels", edit=mean_router_loss),
    "no-object-loss": Experiment("without Eq. 12", {"lambda_object": 0.0}),
    "router-16": Experiment("routers with a hidden layer of 16", edit=partial(router_width, 16)),
    "router-64": Experiment("routers with a hidden layer of 64", edit=partial(router_width, 64)),
    "router-deep": Experiment("routers with two hidden layers of 16", edit=partial(deeper_routers, 16)),
    "cross-only": Experiment("MoA in cross-attention only",
                             edit=partial(only, lambda layer, kind: kind == "cross")),
    "self-only": Experiment("MoA in self-attention only",
                            edit=partial(only, lambda layer, kind: kind == "self")),
    "decoder-only": Experiment("MoA in the decoder only",  # the middle block is l = 6
                               edit=partial(only, lambda layer, kind: layer > 6)),
    "every-second": Experiment("MoA in every second block",
                               edit=partial(only, lambda layer, kind: layer % 2 == 0)),
    "half": Experiment("half the training", {"steps": STEPS // 2}),
    "double": Experiment("twice the training", {"steps": 2 * STEPS}),
    "unseen-pairs": Experiment("trained without three pairs of attributes", edit=without_unseen_pairs),
}
RUNS, SHIPPED = Path("runs/ablations"), Path(__file__).resolve().parent / "docs" / "ablations"
METHOD = "moa"  # the experiment that the others are compared with


# --- training and drawing ---


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("experiment", nargs="?", choices=EXPERIMENTS, metavar="EXPERIMENT",
                      help="train and evaluate this one")
    what.add_argument("--list", action="store_true", help="what the experiments are")
    what.add_argument("--all", action="store_true",
                      help=f"all experiments with the seeds {', '.join(map(str, SEEDS))} that are not there")
    what.add_argument("--table", action="store_true", help="print what is there; a plot beside it")
    add("--output", type=Path, metavar="FOLDER",
        help="of all experiments' folders (default runs/ablations; where there is none, --table prints what "
             "ships with the code)")
    add("--seed", type=int, default=0, help="of one experiment's training (default 0)")
    add("--jobs", type=int, default=1, metavar="N",
        help="experiments at the same time, one core each; on a GPU 1 is best (default 1)")
    args = parser.parse_args(argv)
    args.output = args.output or (SHIPPED if args.table and not RUNS.exists() else RUNS)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.list:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:28}{experiment.what}")
    elif args.table:
        print(table(args.output))
    elif args.all:
        run_all(args.output, args.jobs)
    else:
        run(args.experiment, args.seed, args.output)


def folder_of(output: Path, name: str, seed: int) -> Path:
    return output / name / f"seed-{seed}"


def run(name: str, seed: int, output: Path) -> None:
    """Train and evaluate one experiment, or go on with it."""
    experiment, folder = EXPERIMENTS[name], folder_of(output, name, seed)
    trained = folder_of(output, experiment.trained_by or name, seed)
    if (folder / "results.json").exists():
        print(f"{folder / 'results.json'} is there already")
        return
    with experiment.edit(), full_precision() if torch.cuda.is_available() else nullcontext():
        if not (trained / "moa.safetensors").exists():
            if experiment.trained_by:
                fail(f"{trained} has no weights: run the experiment {experiment.trained_by} first")
            with preset(experiment.config):
                train_moa(trained, seed)
        flags = [word for key, value in experiment.evaluation.items() for word in (f"--{key}", str(value))]
        evaluate.main(["--weights", str(trained), "--output", str(folder), "--count", str(CASES), *flags])


@contextmanager
def full_precision() -> Iterator[None]:
    """A GPU trains and draws in fp32, as a CPU does, so that experiments of both can be compared."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with patch.object(training.Stage, "autocast", lambda self: nullcontext()):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def preset(config: dict) -> AbstractContextManager:
    """Inside, the small world's preset of `moa` has these values, and the experiments' budget."""
    changes = {"steps": STEPS, "batch_size": BATCH_SIZE, **config}
    return patch.dict(train.PRESETS["toyworld"], moa=train.make_config("toyworld", "moa", **changes))


def train_moa(folder: Path, seed: int) -> None:
    """`train.py moa`, from the last checkpoint on where there is one."""
    flags = ["--graph"] if torch.cuda.is_available() else []
    with patch.object(sys, "argv", ["train.py", "moa", "--weights", str(evaluate.SHIPPED), "--output",
                                    str(folder), "--seed", str(seed), "--checkpoint-every", "250",
                                    "--resume", *flags]):
        train.main()


def run_all(output: Path, jobs: int) -> None:
    """Every experiment with every seed, `jobs` at a time, those that others need first; logs beside the runs.
    Exit status 1 where one failed."""
    output.mkdir(parents=True, exist_ok=True)
    # What all train on, which each would render and encode by itself otherwise.
    config = train.make_config("toyworld", "moa")
    scenes = render_cache("scenes", config.samples)
    train.STAGES["moa"](config, 0, pick_device("auto"), scenes, evaluate.SHIPPED, cache=ENCODED)
    done = []
    for needs_another in (False, True):
        todo = [(name, seed) for seed in SEEDS for name, experiment in EXPERIMENTS.items()
                if bool(experiment.trained_by) == needs_another
                and not (folder_of(output, name, seed) / "results.json").exists()]
        with ThreadPoolExecutor(jobs) as pool:
            done += tqdm(pool.map(partial(run_alone, output), todo), "experiments", len(todo), disable=None)
    if not all(done):
        sys.exit(1)


def run_alone(output: Path, job: tuple[str, int]) -> bool:
    """An experiment in a process of its own; whether there is a result of it."""
    name, seed = job
    log = output / f"{name}-{seed}.log"
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, __file__, name, "--seed", str(seed), "--output", str(output)],
                              stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"},
                              check=False).returncode == 0
    tqdm.write(f"{name}, seed {seed}: " + ("done" if done else f"failed, see {log}"))
    return done


# --- the table ---

COLUMNS = ("identity", "mixup", "context", "activity", "locality", "prior_agreement", "router_iou", "variety")
COMPARED = ("identity", "mixup", "activity", "locality", "prior_agreement", "router_iou")
ENOUGH = 10  # degrees of freedom of the seeds' deviation: with fewer it is too uncertain to print in bold
Results = dict[str, dict[int, dict]]  # experiment -> seed -> results.json


def table(output: Path) -> str:
    """Means over the seeds of the experiments that are there, in brackets their intervals over the cases,
    first of all what the base model alone has of them; below, how far each is from the method. Writes
    tradeoff.png."""
    found = {name: seeds for name in EXPERIMENTS if (seeds := results_of(output, name))}
    if not found:
        fail(f"there is no result in {output}: run an experiment first")
    everyone = [result for seeds in found.values() for result in seeds.values()]
    lines = [header(COLUMNS)]
    if prior := next((result for result in everyone if "prior_identity" in result), None):
        cells = [over_seeds([prior[f"prior_{column}"]]) if f"prior_{column}" in prior else "-"
                 for column in COLUMNS]
        lines.append(f"| the prior alone, nobody put in | | {' | '.join(cells)} |")
    for name, seeds in found.items():
        cells = [over_seeds([result[column] for result in seeds.values()]) for column in COLUMNS]
        lines.append(f"| `{name}`: {EXPERIMENTS[name].what} | {len(seeds)} | {' | '.join(cells)} |")
    if output != SHIPPED:  # with the plot
        plot(found, output / "tradeoff.png")
    return "\n".join([*lines, *differences(found)])


def header(columns: tuple[str, ...]) -> str:
    """The first two lines of a table."""
    return (f"| experiment | seeds | {' | '.join(map(evaluate.label, columns))} |\n"
            + "|---" * (2 + len(columns)) + "|")


def results_of(output: Path, name: str) -> dict[int, dict]:
    """Seed -> results.json of an experiment."""
    found = {int(path.parent.name.removeprefix("seed-")): json.loads(path.read_text(encoding="utf-8"))
             for path in output.glob(f"{name}/seed-*/results.json")}
    return dict(sorted(found.items()))


def over_seeds(scores: list[dict]) -> str:
    """One score of an experiment: the mean of its seeds, and an interval that lies about it as, on average,
    those of the seeds that have one lie about theirs."""
    counted = [score for score in scores if score["n"]]
    if not counted:
        return "-"
    mean = sum(score["mean"] for score in counted) / len(counted)
    spans = [score for score in counted if score["n"] >= FEWEST and score.get("low") is not None]
    ends = {end: mean + sum(score[end] - score["mean"] for score in spans) / len(spans) if spans else None
            for end in ("low", "high")}
    return evaluate.cell({"mean": mean, **ends})


def differences(found: Results) -> list[str]:
    """How far each experiment is from the method, with two standard errors: of the difference case by case,
    and of the trainings' seeds. Lines of Markdown."""
    lines = ["", f"The experiment minus `{METHOD}`, over the seeds of both; behind ± two standard errors, "
                 "over the cases and of the trainings' seeds; more than that is bold.", "", header(COMPARED)]
    for name in found:
        cells = [difference(found, name, column) for column in COMPARED]
        if name != METHOD and any(cells):
            seeds = sum(map(len, shared_seeds(found, name)))
            lines.append(f"| `{name}` | {seeds} | {' | '.join(cells)} |")
    spread = {column: spread_of_seeds(found, column) for column in COMPARED}
    said = [f"{evaluate.label(column)} {deviation:.3f}" for column, (deviation, _) in spread.items()]
    return [*lines, "", "One standard deviation of a training's seed, pooled over the experiments that have "
            f"several ({max(freedom for _, freedom in spread.values())} degrees of freedom at most): "
            f"{', '.join(said)}."]


def shared_seeds(found: Results, name: str) -> tuple[list[int], list[int]]:
    """The seeds that an experiment and the method have of the same cases: those with the scores of both case
    by case, and those of which only as many means are left."""
    paired, means = [], []
    for seed, result in found[name].items():
        other = found.get(METHOD, {}).get(seed, {})
        if "cases" in result and "cases" in other:
            if result["cases"]["number"] == other["cases"]["number"]:
                paired.append(seed)
        elif other and result["identity"]["n"] == other["identity"]["n"]:
            means.append(seed)
    return paired, means


def difference(found: Results, name: str, column: str) -> str:
    """An experiment's score minus the method's with two standard errors, bold where it is more than these and
    enough seeds say what another one changes; empty without scores case by case. Seeds of which only means
    are left count as well; the error over the cases is that of the others."""
    own, method = found[name], found.get(METHOD, {})
    paired, means = shared_seeds(found, name)
    means = [seed for seed in means if own[seed][column]["n"] and method[seed][column]["n"]]
    cases = [np.subtract(*(np.array(of[seed]["cases"][column], float) for of in (own, method)))
             for seed in paired]
    values = np.mean(cases, 0)[~np.isnan(np.mean(cases, 0))] if paired else []
    if len(values) < 2:
        return ""
    seeds = len(paired) + len(means)
    less = (len(paired) * np.mean(values)
            + sum(own[seed][column]["mean"] - method[seed][column]["mean"] for seed in means)) / seeds
    deviation, freedom = spread_of_seeds(found, column)
    error = np.sqrt(np.var(values, ddof=1) / len(values) + 2 * deviation ** 2 / seeds)
    text = f"{less:+.3f} ± {2 * error:.3f}"
    return f"**{text}**" if abs(less) > 2 * error and freedom >= ENOUGH else text


def spread_of_seeds(found: Results, column: str) -> tuple[float, int]:
    """Standard deviation of a score from seed to seed of an experiment, pooled over all that have several
    seeds, and its degrees of freedom. Experiments with others' weights say nothing new."""
    squares = freedom = 0
    for name, seeds in found.items():
        means = [result[column]["mean"] for result in seeds.values() if result[column]["n"]]
        # The map of routers that are constants has the score 0 with every seed.
        if EXPERIMENTS[name].trained_by is None and len(means) > 1 and any(means):
            squares += np.var(means) * len(means)
            freedom += len(means) - 1
    return (float(np.sqrt(squares / freedom)), freedom) if freedom else (0.0, 0)


def plot(found: Results, path: Path) -> None:
    """Identity against what is kept of the base model's picture: means over the seeds, with two standard
    errors. Named are the method and what differs clearly from it. A line joins what was drawn with the same
    weights, the people entering later and later. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is not drawn, it needs: pip install matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(11, 5), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    labels = {"locality": "background change when the person is swapped (low is good)",
              "prior_agreement": "agreement with the base model's layout (high is good)"}
    chance = [result["prior_identity"]["mean"] for seeds in found.values() for result in seeds.values()
              if "prior_identity" in result]
    for axes, (column, text) in zip(panels, labels.items(), strict=True):
        deviations = np.array([spread_of_seeds(found, score)[0] for score in (column, "identity")])
        means, errors, chains = {}, {}, defaultdict(list)
        for name, seeds in found.items():
            points = np.array([[result[score]["mean"] for score in (column, "identity")]
                               for result in seeds.values()], float)
            means[name], errors[name] = points.mean(0), 2 * deviations / len(points) ** 0.5
            chains[EXPERIMENTS[name].trained_by or name].append(means[name])
        method, named = means.get(METHOD, np.full(2, np.nan)), 0
        for name, mean in sorted(means.items(), key=lambda item: item[1][1]):
            same = name != METHOD and (abs(mean - method) < 3 * errors[name]).all()
            color = "C3" if name == METHOD else "0.7" if same else "C0"
            axes.errorbar(*mean, *errors[name][::-1], fmt="o", color=color, elinewidth=0.8, markersize=4)
            if not same:
                # On one side of its line, others on the other; neighbours below and above.
                chain, named = chains[EXPERIMENTS[name].trained_by or name], named + 1
                x, align = (5, "left") if (len(chain) > 1) == (axes is panels[0]) else (-5, "right")
                axes.annotate(name, mean, (x, 4 if named % 2 else -10), textcoords="offset points", ha=align,
                              color=color, fontsize=9, weight="bold" if name == METHOD else None)
        for chain in chains.values():
            axes.plot(*np.array(chain).T, "--", color="C0", linewidth=0.8, zorder=1)
        axes.axhline(np.mean(chance) if chance else np.nan, color="0.5", linewidth=0.8, linestyle=":")
        axes.margins(x=0.25)
        axes.set(xlabel=text)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="identity (high is good; dotted: chance)")
    figure.savefig(path)


if __name__ == "__main__":
    main()
