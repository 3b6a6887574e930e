"""Train and measure a variant of MoA in the small world: what is each part good for?

    python ablate.py --list
    python ablate.py no-router-loss --seed 0          # one row: train, evaluate
    python ablate.py --all --jobs 4                   # every row with three seeds, in the background
    python ablate.py --table                          # what is there by now, as Markdown and plots

All rows have the same budget, data and evaluation, and differ in one thing, which is an edit of a module
below: copy a row to try an idea of your own. What is done is skipped and what was stopped goes on, so a
night can be spent in pieces. A row's folder holds its run, `results.json` of evaluate.py, and `row.json`,
what the row was: with a row that was changed since nothing is done.
"""
import argparse
import inspect
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from types import CodeType, FunctionType

from command import fail, read_json

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
def changed_moa(change: Callable, router_hidden: int | None = None) -> Iterator[None]:
    """Inside, `add_moa` makes routers with a hidden layer of `router_hidden`, if it is given, and `change` is
    called with the UNet, in training and where a file is loaded. Such edits add up."""
    import moa.install
    import training.moa
    add_moa = training.moa.add_moa

    def add(unet, hidden=None):
        add_moa(unet, router_hidden or hidden)
        change(unet)
        return unet

    with replaced(moa.install, "add_moa", add), replaced(training.moa, "add_moa", add):
        yield


@contextmanager
def fixed_routing(personalized: Callable[[int, str], float | None]) -> Iterator[None]:
    """Layers whose router is a constant: `personalized(l, kind)` is its weight, None a learned one."""
    def change(unet) -> None:
        from moa import moa_layers
        for layer, kind, mixture in moa_layers(unet):
            weight = personalized(layer, kind)
            if weight is not None:
                fix(mixture.router, weight)

    with changed_moa(change):
        yield


def fix(router, weight: float) -> None:
    """Make a router's own weights a constant, which its MoA file then holds."""
    import torch
    router.f.requires_grad_(False)
    last = router.f[-1] if isinstance(router.f, torch.nn.Sequential) else router.f
    last.weight.zero_()
    last.bias.copy_(torch.tensor([1 - weight, weight]).clamp(min=1e-13).log())  # about 30, as for fp16


@contextmanager
def full_precision() -> Iterator[None]:
    """Training and drawing on a GPU as on a CPU, in fp32, so that rows of both can be compared."""
    import torch

    from training import Stage
    with (replaced(Stage, "autocast", lambda self: nullcontext()),
          replaced(torch.backends.cudnn, "allow_tf32", False)):
        yield


def router_width(hidden: int):
    """Routers with a hidden layer."""
    return changed_moa(lambda unet: None, hidden)


@contextmanager
def deeper_routers(hidden: int) -> Iterator[None]:
    """Routers with two hidden layers."""
    def change(unet) -> None:
        import torch.nn as nn

        from moa import moa_layers
        for _, _, mixture in moa_layers(unet):
            first, act, last = mixture.router.f
            mixture.router.f = nn.Sequential(
                first, act, nn.Linear(hidden, hidden).to(last.weight), nn.GELU(), last)

    with changed_moa(change, hidden):
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
    import training.moa
    router_loss = training.moa.router_loss
    with replaced(training.moa, "router_loss",
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

    import training.stage
    import toyworld
    batch_indices = training.stage.batch_indices

    @cache
    def allowed(count: int) -> np.ndarray:
        return np.array([seed for seed in range(count) if not any(
            has_unseen_pair(subject.identity) for subject in toyworld.sample_scene(seed).subjects)])

    with replaced(training.stage, "batch_indices", lambda seed, step, size, count:
                  allowed(count)[batch_indices(seed, step, size, len(allowed(count)))]):
        yield


def only(chosen: Callable[[int, str], bool]) -> Callable:
    """An edit: MoA in the chosen layers, in the others the prior."""
    return lambda: fixed_routing(lambda layer, kind: None if chosen(layer, kind) else 0.0)


# What `only` is given has a name, since a row keeps its text: a lambda's is its whole line in ROWS.
def cross_attention(layer: int, kind: str) -> bool:
    return kind == "cross"


def self_attention(layer: int, kind: str) -> bool:
    return kind == "self"


def decoder(layer: int, kind: str) -> bool:
    return layer in DECODER


def every_second(layer: int, kind: str) -> bool:
    return layer % 2 == 0


# FastComposer (arXiv 2305.10431): one branch that is trained, at all timesteps, half of the samples with
# the whole loss; a person enters late ("delayed subject conditioning").
FINETUNED = {"edits": (lambda: fixed_routing(lambda layer, kind: 1.0),), "evaluation": {"prior-above": 1000}}
ROWS = {
    "moa": Row("the method as shipped"),
    "one-branch": Row("no MoA: all attention finetuned, FastComposer's losses",
                      {"masked_probability": 0.5, "lambda_router": 0.0, "max_timestep": 1000}, **FINETUNED),
    **{f"one-branch-{t}": Row(f"the same, the people enter below t = {t}",
                              evaluation={"prior-above": 1000, "start": t}, trained_by="one-branch")
       for t in (800, 600, 400)},
    "people-only": Row("only the people of every sample count, as in the paper", {"masked_probability": 1.0}),
    "no-encoding": Row("no conditioning on (t, l)", edits=(no_encoding,)),
    "no-router-loss": Row("without Eq. 9", {"lambda_router": 0.0}),
    "people-only-no-router-loss": Row("the paper's masked loss, without Eq. 9",
                                      {"masked_probability": 1.0, "lambda_router": 0.0}),
    "mean-router-loss": Row("Eq. 9 as a mean over the pixels", edits=(mean_router_loss,)),
    "no-object-loss": Row("without Eq. 12", {"lambda_object": 0.0}),
    "router-16": Row("routers with a hidden layer of 16", edits=(partial(router_width, 16),)),
    "router-64": Row("routers with a hidden layer of 64", edits=(partial(router_width, 64),)),
    "router-deep": Row("routers with two hidden layers of 16", edits=(partial(deeper_routers, 16),)),
    "cross-only": Row("MoA in cross-attention only", edits=(only(cross_attention),)),
    "self-only": Row("MoA in self-attention only", edits=(only(self_attention),)),
    "decoder-only": Row("MoA in the decoder only", edits=(only(decoder),)),
    "every-second": Row("MoA in every second block", edits=(only(every_second),)),
    "half": Row("half the training", {"steps": STEPS // 2}),
    "double": Row("twice the training", {"steps": 2 * STEPS}),
    "unseen-pairs": Row("trained without three pairs of attributes: see bench/generalization.py",
                        edits=(without_unseen_pairs,)),
}
ALIKE = ("count", "first", "steps", "guidance_scale", "sparse")  # settings of the evaluation
METHOD = "moa"  # the row that the others are compared with
COLUMNS = ("identity", "mixup", "context", "activity", "locality", "prior_agreement", "router_iou", "variety")
COMPARED = ("identity", "mixup", "activity", "locality", "prior_agreement", "router_iou")
ENOUGH = 10  # degrees of freedom of the seeds' deviation: with fewer it is too uncertain to print in bold


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
    add("--seed", type=int, help="of a row's training (default 0)")
    add("--jobs", type=int, default=1, metavar="N",
        help="rows at the same time, one core each; on a GPU 1 is best (default 1)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    if args.seed is not None and not args.row:
        parser.error("--seed is a row's: --all trains every row with the seeds "
                     f"{', '.join(map(str, SEEDS))}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file: give a folder's name")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.list:
            for name, row in ROWS.items():
                print(f"{name:28}{row.what}")
        elif args.table:
            print(table(args.output))
        elif args.all:
            run_all(args.output, args.jobs)
        else:
            run(args.row, args.seed or 0, args.output)
    except (ValueError, OSError) as error:
        fail(error)


def place(output: Path, name: str, seed: int) -> Path:
    return output / name / f"seed-{seed}"


def run(name: str, seed: int, output: Path) -> None:
    """Train and evaluate one row, or go on with it."""
    import torch

    import evaluate
    import train
    row, folder = ROWS[name], place(output, name, seed)
    trainer = row.trained_by or name
    trained = place(output, trainer, seed)
    weights, results = trained / "moa.safetensors", folder / "results.json"
    described = description(name)  # now: this file may be edited while the row is trained
    for made, by in {trained: trainer, folder: name}.items():
        if other := differing(made, by):
            fail(f"{made} is of another version of the row {by}, see its row.json ({other}): move it away, "
                 "or give another --output")
    if results.exists():
        if weights.exists() and weights_of(read_json(results)) not in (None, evaluate.checksum(weights)):
            fail(f"{results} is of other weights than {weights}: remove it to measure these")
        print(f"{results} is there already")
        return
    with ExitStack() as stack:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            stack.enter_context(full_precision())
        for edit in edits_of(row):
            stack.enter_context(edit())
        if row.trained_by is None and not weights.exists():
            keep_description(folder, described)
            stack.enter_context(preset(row.config))
            flags = ["--resume"] if train.list_checkpoints(trained) else []
            flags += ["--graph"] if on_gpu else []
            stack.enter_context(replaced(sys, "argv", [
                "train.py", "moa", "--weights", str(ROOT / "weights" / "toyworld"), "--output", str(trained),
                "--seed", str(seed), "--checkpoint-every", "250", *flags]))
            train.main()
        if not weights.exists():
            fail(f"{weights} is not there: run the row {row.trained_by} first")
        keep_description(folder, described)
        flags = [word for key, value in row.evaluation.items() for word in (f"--{key}", str(value))]
        evaluate.main(["--weights", str(trained), "--output", str(folder), "--count", str(CASES), *flags])


def edits_of(row: Row) -> tuple[Callable, ...]:
    """A row's edits, those first that its weights were trained with."""
    return (*ROWS[row.trained_by].edits, *row.edits) if row.trained_by else row.edits


# --- what a row was when it was run ---


def description(name: str) -> dict:
    """What a row is, as its row.json holds it: settings of training and of drawing, the text of its edits.
    Of the modules that they edit, and of the base model, it says nothing."""
    from dataclasses import asdict

    from train import make_config
    row = ROWS[name]
    with preset(ROWS[row.trained_by or name].config):
        config = asdict(make_config("toyworld", "moa"))
    found = {"config": config, "evaluation": {"count": CASES, **row.evaluation},
             "trained_by": row.trained_by,
             "edits": [source for edit in edits_of(row) for source in sources(edit)]}
    return json.loads(json.dumps(found))


def sources(edit: Callable) -> list[str]:
    """The text of an edit, of the functions of its file and of this one that it calls or holds, and the
    constants in it."""
    found, todo = {}, [edit]
    homes = {__name__, inspect.unwrap(edit.func if isinstance(edit, partial) else edit).__module__}
    while todo:
        each = inspect.unwrap(todo.pop())
        if isinstance(each, partial):
            found[each] = f"{each.args} {each.keywords}"
            todo.append(each.func)
        elif isinstance(each, FunctionType) and each.__module__ in homes and each not in found:
            cells = [cell.cell_contents for cell in each.__closure__ or ()]
            held = dict(zip(each.__code__.co_freevars, cells, strict=True))
            named = {word: each.__globals__.get(word) for word in words_of(each.__code__)}
            todo += [*named.values(), *cells]
            found[each] = inspect.getsource(each)
            constants = {word: value for word, value in named.items() if word.isupper()} | held
            found |= {word: f"{word} = {value!r}" for word, value in constants.items()
                      if isinstance(value, (int, float, str, tuple, range))}
            if each.__defaults__ or each.__kwdefaults__:
                found[each, "defaults"] = f"{each.__defaults__} {each.__kwdefaults__}"
    return list(found.values())


def words_of(code: CodeType) -> list[str]:
    """What a function's code names, also inside of the functions that it makes."""
    inner = [word for part in code.co_consts if isinstance(part, CodeType) for word in words_of(part)]
    return [*code.co_names, *inner]


def keep_description(folder: Path, described: dict) -> None:
    """Write row.json."""
    from models.load import write_json
    folder.mkdir(parents=True, exist_ok=True)
    write_json(described, folder / "row.json")


def differing(folder: Path, name: str) -> str:
    """What of a row is another than in a folder's row.json: nothing where there is none. Settings that a
    folder does not know are newer than it."""
    path = folder / "row.json"
    if not path.exists():
        return ""
    found, now = read_json(path), description(name)
    now["config"] = {key: value for key, value in now["config"].items() if key in found.get("config", {})}
    return ", ".join(key for key, value in now.items() if found.get(key) != value)


def weights_of(result: dict) -> str | None:
    """The checksum of the MoA weights that a results.json was measured on, where it has one."""
    return result.get("run", {}).get("sha256", {}).get("moa")


@contextmanager
def preset(config: dict) -> Iterator[None]:
    """Inside, the small world's preset of `moa` has these values."""
    from dataclasses import replace

    from train import PRESETS
    before, config = PRESETS["toyworld"], {"steps": STEPS, "batch_size": BATCH_SIZE, **config}
    PRESETS["toyworld"] = {**before, "moa": replace(before["moa"], **config)}
    try:
        yield
    finally:
        PRESETS["toyworld"] = before


def run_all(output: Path, jobs: int) -> None:
    """Every row with every seed, `jobs` at a time, those that others need first; logs beside the runs. Exit
    status 1 where one failed; SIGTERM stops all, which save what they have."""
    from tqdm import tqdm
    output.mkdir(parents=True, exist_ok=True)
    prepare_data()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children, stopped = set(), Event()

    def one(job: tuple[str, int]) -> bool:
        name, seed = job
        command = [sys.executable, str(ROOT / "ablate.py"), name, "--seed", str(seed),
                   "--output", str(output)]
        with open(output / f"{name}-{seed}.log", "a", encoding="utf-8") as log:
            if stopped.is_set():
                return False
            with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as child:
                children.add(child)
                if stopped.is_set():  # in between
                    child.terminate()
            children.remove(child)
        done = child.returncode == 0 and (place(output, name, seed) / "results.json").exists()
        tqdm.write(f"{name}, seed {seed}: " + ("done" if done else f"failed, see {log.name}"))
        return done

    def stop(number: int, frame) -> None:
        stopped.set()
        for child in list(children):
            child.terminate()
        sys.exit(128 + number)

    before, done = signal.signal(signal.SIGTERM, stop), []
    try:
        for again in (False, True):
            todo = [(name, seed) for seed in SEEDS for name, row in ROWS.items()
                    if bool(row.trained_by) == again
                    and (not (place(output, name, seed) / "results.json").exists()
                         or differing(place(output, name, seed), name))]
            with ThreadPoolExecutor(jobs) as pool:
                done += tqdm(pool.map(one, todo), "ablations", len(todo), unit="row", disable=None)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not all(done):
        sys.exit(1)


def prepare_data() -> None:
    """Render and encode what all rows train on, which each would do by itself otherwise."""
    from pipeline import pick_device
    from data.sample import ENCODED
    from toyworld.rendered import render_cache
    from train import STAGES, make_config
    config = make_config("toyworld", "moa")
    STAGES["moa"](config, 0, pick_device("auto"), render_cache("scenes", config.samples),
                  ROOT / "weights" / "toyworld", cache=ENCODED)


def table(output: Path) -> str:
    """Means over the seeds of the rows that are there, in brackets their intervals over the cases, first of
    all what the base model alone has of them; below, how far each row is from the method. Writes
    tradeoff.png."""
    found = {name: seeds for name in ROWS if (seeds := results_of(output, name))}
    if not found:
        fail(f"there is no result in {output}: run a row first")
    everyone = [result for seeds in found.values() for result in seeds.values()]
    if several := mixed(everyone):
        print(f"differences are not of the rows alone, these were measured with more than one: "
              f"{', '.join(several)}", file=sys.stderr)
    lines = ["| row | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    if prior := next((result for result in everyone if "prior_identity" in result), None):
        cells = [over_seeds([prior[f"prior_{column}"]]) if f"prior_{column}" in prior else "-"
                 for column in COLUMNS]
        lines.append(f"| the prior alone, nobody put in | | {' | '.join(cells)} |")
    for name, seeds in found.items():
        cells = [over_seeds([result[column] for result in seeds.values()]) for column in COLUMNS]
        lines.append(f"| `{name}`: {ROWS[name].what} | {len(seeds)} | {' | '.join(cells)} |")
    plot(found, output / "tradeoff.png")
    return "\n".join([*lines, *differences(found)])


def results_of(output: Path, name: str) -> dict[int, dict]:
    """Seed -> results.json of a row. What was made by another version of it, or of other weights than those
    of the row that trained them, is left out, and said."""
    found = {}
    for path in output.glob(f"{name}/seed-*/results.json"):
        seed = path.parent.name.removeprefix("seed-")
        if not seed.isdecimal():  # moved away
            continue
        result, other = read_json(path), differing(path.parent, name)
        if trainer := ROWS[name].trained_by:
            trained = place(output, trainer, int(seed)) / path.name
            if trained.exists() and weights_of(read_json(trained)) not in (None, weights_of(result)):
                other = "weights"
        if other:
            print(f"{path} is left out: the row was another ({other})", file=sys.stderr)
        elif missing := [column for column in COLUMNS if column not in result]:
            print(f"{path} is left out: it has no {missing[0]}, so it is not evaluate.py's", file=sys.stderr)
        else:
            found[int(seed)] = result
    return dict(sorted(found.items()))


def mixed(results: list[dict]) -> list[str]:
    """What of device, settings of the evaluation and weights other than MoA's is not the same in all results
    that name it."""
    values = defaultdict(set)
    for result in results:
        run, settings = result.get("run", {}), result.get("settings", {})
        named = {"device": run.get("device"), **{name: settings.get(name) for name in ALIKE},
                 **{f"{part} weights": sum_ for part, sum_ in run.get("sha256", {}).items() if part != "moa"}}
        for name, value in named.items():
            if value is not None:
                values[name].add(value)
    return [name for name, found in values.items() if len(found) > 1]


def over_seeds(scores: list[dict]) -> str:
    """One score of a row: the mean of its seeds, and an interval that lies about it as, on average, those of
    the seeds that have one lie about theirs."""
    from evaluate import FEWEST, cell
    counted = [score for score in scores if score["n"]]
    if not counted:
        return cell(dict.fromkeys(("mean", "low", "high")))
    mean = sum(score["mean"] for score in counted) / len(counted)
    spans = [score for score in counted if score["n"] >= FEWEST and score.get("low") is not None]
    ends = {end: mean + sum(score[end] - score["mean"] for score in spans) / len(spans) if spans else None
            for end in ("low", "high")}
    return cell({"mean": mean, **ends})


def differences(found: dict[str, dict[int, dict]]) -> list[str]:
    """How far each row is from the method, with two standard errors: of the difference case by case, and of
    the trainings' seeds. Lines of Markdown."""
    compared = {name: cells for name in found if name != METHOD
                and any(cells := [difference(found, name, column) for column in COMPARED])}
    if not compared:
        return []
    spread = {column: spread_of_seeds(found, column) for column in COMPARED}
    said = [f"{column} {deviation:.3f}" for column, (deviation, _) in spread.items() if deviation]
    freedom = max(freedom for _, freedom in spread.values())
    if freedom >= ENOUGH:
        errors = "two standard errors, over the cases and of the trainings' seeds; more than that is bold"
    elif said:
        errors = ("two standard errors, over the cases and of the trainings' seeds. These are too few yet "
                  "for more than that to be printed in bold")
    else:
        errors = ("two standard errors over the cases. How much another seed would change is not known: "
                  "no row has two")
    lines = ["", f"The row minus `{METHOD}`, over the seeds of both; behind ± {errors}.", "",
             "| row | seeds | " + " | ".join(COMPARED) + " |", "|---" * (2 + len(COMPARED)) + "|"]
    lines += [f"| `{name}` | {sum(map(len, shared_seeds(found, name)))} | {' | '.join(cells)} |"
              for name, cells in compared.items()]
    if said:
        lines += ["", f"One standard deviation of a training's seed, pooled over the rows that have several "
                  f"({freedom} degrees of freedom at most): {', '.join(said)}."]
    return lines


def shared_seeds(found: dict[str, dict[int, dict]], name: str) -> tuple[list[int], list[int]]:
    """The seeds that a row and the method have of the same cases: those with the scores of both case by case,
    and those of which only as many means are left."""
    paired, means = [], []
    for seed, result in found[name].items():
        other = found.get(METHOD, {}).get(seed, {})
        if "cases" in result and "cases" in other:
            if result["cases"]["number"] == other["cases"]["number"]:
                paired.append(seed)
        elif other and result["identity"]["n"] == other["identity"]["n"]:
            means.append(seed)
    return paired, means


def difference(found: dict[str, dict[int, dict]], name: str, column: str) -> str:
    """A row's score minus the method's with two standard errors; empty without scores case by case. Seeds of
    which only means are left count as well; the error over the cases is that of the others."""
    import numpy as np
    row, method = found[name], found.get(METHOD, {})
    paired, means = shared_seeds(found, name)
    means = [seed for seed in means if row[seed][column]["n"] and method[seed][column]["n"]]
    cases = [np.subtract(*(np.array(of[seed]["cases"][column], float) for of in (row, method)))
             for seed in paired]
    values = np.mean(cases, 0)[~np.isnan(np.mean(cases, 0))] if paired else []
    if len(values) < 2:
        return ""
    seeds = len(paired) + len(means)
    less = (len(paired) * np.mean(values)
            + sum(row[seed][column]["mean"] - method[seed][column]["mean"] for seed in means)) / seeds
    deviation, freedom = spread_of_seeds(found, column)
    error = np.sqrt(np.var(values, ddof=1) / len(values) + 2 * deviation ** 2 / seeds)
    text = f"{less:+.3f} ± {2 * error:.3f}"
    return f"**{text}**" if freedom >= ENOUGH and abs(less) > 2 * error else text


def spread_of_seeds(found: dict[str, dict[int, dict]], column: str) -> tuple[float, int]:
    """Standard deviation of a score from seed to seed of a row, pooled over all rows that have several
    seeds, and its degrees of freedom. Rows with others' weights say nothing new."""
    import numpy as np
    squares = freedom = 0
    for name, seeds in found.items():
        means = [result[column]["mean"] for result in seeds.values() if result[column]["n"]]
        # The map of routers that are constants has the score 0 with every seed.
        if ROWS[name].trained_by is None and len(means) > 1 and any(means):
            squares += np.var(means) * len(means)
            freedom += len(means) - 1
    return (float(np.sqrt(squares / freedom)), freedom) if freedom else (0.0, 0)


def plot(found: dict[str, dict[int, dict]], path: Path) -> None:
    """Identity against what is kept of the prior's picture: a large mark for the mean of a row, with two
    standard errors of its seeds, and a small one for each seed. A line joins what was drawn with the same
    weights, the people entering later and later."""
    import numpy as np
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
        deviations = np.array([spread_of_seeds(found, score)[0] for score in (column, "identity")])
        chains = defaultdict(list)
        for k, (name, seeds) in enumerate(found.items()):
            points = np.array([[result[score]["mean"] for score in (column, "identity")]
                               for result in seeds.values()], float)
            mean, error = points.mean(0), 2 * deviations / len(points) ** 0.5
            chains[ROWS[name].trained_by or name].append(mean)
            shape, color = ("*", "black") if name == METHOD else ("os^Dv<>"[k % 7], f"C{k % 10}")
            axes.plot(*points.T, shape, color=color, markersize=3, alpha=0.4)
            axes.errorbar(*mean, *error[::-1], fmt=shape, color=color, markersize=15 if name == METHOD else 7,
                          elinewidth=0.8, label=name, zorder=4 if name == METHOD else 3)
        for chain in chains.values():
            axes.plot(*np.array(chain).T, "--", color="black", linewidth=0.8, zorder=1)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="identity: attributes read right (high is good)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
