"""Train one stage and write its weights.

    python train.py moa --weights weights/toyworld --output runs/moa
    torchrun --nproc-per-node 4 train.py moa --preset sd15 --weights SD15 --data DATA --output runs/sd15

A run's folder has config.json, metrics.jsonl, checkpoints, sample sheets and all weights: it is the next
stage's --weights. The stages of the small world: vae -> clip -> prior -> moa; prior -> controlnet, lora.
Runs are deterministic: --resume continues to the same weights. Under torchrun the processes split each
batch. On a CPU, one process per core is faster than threads.
"""
import argparse
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

# First: it says what is not installed, and how torch's threads wait.
from models.errors import Parser, fail, fail_if_memory

import torch
from tqdm import tqdm

from data.fastcomposer import Folder, read_ids
from data.sample import ENCODED, Samples
from models.device import pick_device, reuse_memory
from models.load import build_config, read_config
from models.unet import UNetConfig
from sample import WarningPrinter
from toyworld import SIZE
from toyworld.crayon import Crayons
from toyworld.presets import TOYWORLD
from toyworld.rendered import render_cache
from toyworld.stages import STAGES as TOYWORLD_STAGES
from training import (SD15, LoRAStage, MoAStage, RecordedStep, Stage, StageError, TrainConfig, check_graph,
                      distributed)
from training.checkpoints import Run, list_checkpoints
from training.log import Log
from weights.hub import find_weights

STAGES: dict[str, type[Stage]] = {"moa": MoAStage, "lora": LoRAStage, **TOYWORLD_STAGES}
PRESETS = {"toyworld": TOYWORLD, "sd15": SD15}
PATIENCE = 10  # steps in a row whose gradient is not finite, and which are left out, before a run ends


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("stage", choices=STAGES, metavar="STAGE", help=", ".join(STAGES) + " (--preset sd15: moa, lora)")
    add("--output", required=True, type=Path, metavar="FOLDER",
        help="a new folder, or with --resume an earlier run's")
    add("--weights", type=Path, metavar="FOLDER",
        help="the models to build on, or their name on the hub (all but vae, classifier)")
    add("--preset", default="toyworld", choices=PRESETS, help="sizes and settings (default toyworld)")
    add("--data", type=Path, metavar="FOLDER",
        help="a data set in FastComposer's layout (default: the small world, rendered)")
    add("--steps", type=positive, metavar="N", help="optimizer steps (default: the preset's)")
    add("--batch-size", type=positive, metavar="N",
        help="pictures a step, of all processes together (default: the preset's)")
    add("--resume", action="store_true", help="go on from the run's newest checkpoint, if there is one")
    add("--seed", type=int, default=0, help="of weights, data order and noise (default 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    add("--samples", type=positive, metavar="N",
        help="how many to render (default: the preset's) or to read (default: all of --data)")
    add("--moa", type=Path, metavar="FILE", help="MoA file to go on from (moa; default: the base model)")
    add("--accumulate", type=positive, metavar="N",
        help="split a process's share of a batch into N parts, to save memory (default: the preset's)")
    add("--cache", type=Path, metavar="FOLDER",
        help="keep latents and features of --data there; faster, but each picture has one fixed augmentation "
             "(prior, moa, lora)")
    add("--graph", action="store_true",
        help="steps as a CUDA graph, faster for small models (prior, moa, controlnet, lora; not sd15)")
    add("--log-every", type=positive, default=50, metavar="STEPS",
        help="between lines of metrics.jsonl (default 50)")
    add("--checkpoint-every", type=positive, default=1000, metavar="STEPS",
        help="between checkpoints (default 1000)")
    add("--samples-every", type=int, metavar="STEPS",
        help="between sample sheets; 0 draws none (default: as --checkpoint-every)")
    add("--keep", type=positive, default=1, metavar="N", help="checkpoints that stay, the newest (default 1)")
    args = parser.parse_args()
    if args.samples_every is None:
        args.samples_every = args.checkpoint_every
    return args


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


class StopRequested(Exception):
    """A signal arrived; the arguments are its number and what to tell."""


def leave(number: int, frame) -> None:
    """End before the first step."""
    print("stopped: before the first step", file=sys.stderr)
    sys.exit(128 + number)


def main() -> None:
    args = parse_args()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, leave)
    reuse_memory()
    stage = None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = WarningPrinter()
            if args.weights:
                args.weights = find_weights(args.weights)
            check(args)
            if args.data and not args.samples:
                args.samples = len(read_ids(args.data, "train"))
            config = make_config(args.preset, args.stage, steps=args.steps, batch_size=args.batch_size,
                                 samples=args.samples, accumulate=args.accumulate)
            device = pick_device(args.device)
            if args.graph:
                check_graph(STAGES[args.stage], config, device)
            device = distributed.start(device)
            with distributed.first_rank_first():
                samples = open_samples(args, config)
            cache = args.cache if args.data else ENCODED
            stage = STAGES[args.stage](config, args.seed, device, samples, args.weights, args.moa, cache)
            train(stage, args)
    except (OSError, ValueError) as error:
        unnamed = isinstance(error, OSError) and error.errno and not error.filename  # of a file that is open
        place = f"{args.output}: " if unnamed else ""
        fail(f"{place}{error}")
    except (MemoryError, RuntimeError) as error:
        larger = "" if args.graph else "a larger --accumulate, or "
        fail_if_memory(error, f"give {larger}a smaller --batch-size")
    except (StopRequested, KeyboardInterrupt) as stop:
        number, message = stop.args or (signal.SIGINT, "before the first step")
        print("stopped:", message, file=sys.stderr)
        sys.exit(0 if number == signal.SIGTERM else 128 + number)
    finally:
        if stage is not None:
            stage.stream.close()
        distributed.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check(args: argparse.Namespace) -> None:
    """Raise StageError for a command line that no run can be made of. An older run is only ever continued,
    weights are left alone."""
    stage = STAGES[args.stage]
    for name in ("weights", "data", "moa", "cache"):
        if getattr(args, name) is not None and name not in stage.reads:
            raise StageError(f"{args.stage} cannot use --{name}: leave it out")
    if stage.needs_weights and args.weights is None:
        raise StageError(f"{args.stage} needs --weights FOLDER with the models that it builds on")
    if args.cache and not args.data:
        raise StageError("--cache goes with --data: rendered scenes are always kept in .cache")
    base = read_config(args.weights) if args.weights else {}
    if args.preset == "toyworld" and "unet" in base and build_config(base, "unet") == UNetConfig():
        raise StageError(f"{args.weights} is of Stable Diffusion 1.5's size: give --preset sd15 "
                         "(toyworld is the default)")
    if args.preset == "sd15" and args.data and base.get("world"):
        warnings.warn(f"--preset sd15 has Stable Diffusion's settings, {args.weights} is of the small world",
                      stacklevel=2)
    if args.output.exists() and not args.output.is_dir():
        raise StageError(f"--output {args.output} is a file: give a folder's name")
    if list_checkpoints(args.output):
        if not args.resume:
            raise StageError(f"{args.output} holds a run already: give --resume or another --output")
        config = read_config(args.output) if (args.output / "config.json").exists() else {}
        data = config.get("training", {"data": args.data}).get("data")
        if bool(data) != bool(args.data):
            raise StageError(f"{args.output} was trained on {data or 'rendered scenes'}: resume it with "
                             f"{'the same' if data else 'no'} --data")
    elif any(args.output.glob("*.safetensors")):
        raise StageError(f"{args.output} holds weights already: give another --output")
    elif (args.output / "metrics.jsonl").exists() and not args.resume:
        raise StageError(f"{args.output} holds a run already, which may still go on: give another --output, "
                         "or --resume")
    elif args.output.exists() and any(args.output.iterdir()) and not (args.output / "checkpoints").exists():
        raise StageError(f"{args.output} holds files that are of no run: give a new folder as --output")


def make_config(preset: str, stage: str, **changes) -> TrainConfig:
    """The preset of a stage with those values that are not None."""
    if stage not in PRESETS[preset]:
        raise StageError(f"preset {preset} has no stage {stage}: its base model comes from "
                         "weights/convert_sd15.py, only `moa` and `lora` are trained")
    return replace(PRESETS[preset][stage], **{k: v for k, v in changes.items() if v is not None})


def open_samples(args: argparse.Namespace, config: TrainConfig) -> Samples:
    """Those of --data, else rendered scenes, which the style's stage sees in crayon."""
    size = read_config(args.weights).get("image_size", SIZE) if args.weights else SIZE
    if args.data:
        seed = args.seed if args.cache is None else 0  # a cache serves runs with any seed
        return Folder(args.data, config.samples, size, max_people=config.max_people,
                      augmented=config.augment, seed=seed)
    if size != SIZE:
        raise StageError(f"{args.weights} draws {size} pixels, the small world's scenes have {SIZE}: "
                         "give --data FOLDER")
    scenes = render_cache("scenes", config.samples)
    return Crayons(scenes) if args.stage == "lora" else scenes


def train(stage: Stage, args: argparse.Namespace) -> None:
    """The loop that all stages share."""
    config, writes = stage.config, distributed.rank() == 0
    trained = {name: p for name, p in stage.module.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas,
                                  weight_decay=config.weight_decay, fused=True)
    average = {name: p.detach().clone() for name, p in trained.items()} if config.ema else trained
    run = Run(args.output, args.stage, stage, trained, average, optimizer)
    first = run.resume() if args.resume else 0
    if writes and not args.resume and (args.output / "metrics.jsonl").exists():
        raise StageError(f"{args.output} holds a run that began meanwhile: give another --output")
    log = Log(args.output, settings_of(args, stage), first) if writes else None
    recorded = RecordedStep(stage) if args.graph else None
    failed, skipped, stop = 0, 0, []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stop.append(received))
    progress = tqdm(range(first, config.steps), args.stage, config.steps, initial=first, unit="step",
                    disable=not writes)
    for step in progress:
        done, losses = step + 1, []
        optimizer.param_groups[0]["lr"] = config.lr * learning_rate_factor(step, config)
        for turn in range(config.accumulate):
            with stage.autocast():
                batch = stage.batch(step, turn)
            if recorded:
                loss, parts = recorded(batch)  # and the gradients
            else:
                with stage.autocast():
                    loss, parts = stage.loss(batch)
                (loss / config.accumulate).backward()
            losses.append({"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}})
        stopping = distributed.average_gradients(parameters, bool(stop))
        logged = done % args.log_every == 0 or done == config.steps
        health = stage.health() if logged else {}
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        if torch.isfinite(norm):
            failed = 0
            optimizer.step()
        else:
            failed, skipped = failed + 1, skipped + 1
        optimizer.zero_grad(set_to_none=True)
        if failed > PATIENCE:
            raise ValueError(f"the gradient was not finite in {failed} steps in a row, up to step {step}: "
                             "lower the learning rate and go on from the newest checkpoint")
        if config.ema:
            decay = min(config.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters], 1 - decay)
        if logged:
            means = distributed.mean({k: torch.stack([part[k] for part in losses]).mean() for k in losses[0]})
            if writes:
                log.add({"step": done, **means, "skipped": skipped, "lr": optimizer.param_groups[0]["lr"],
                         "gradient_norm": float(norm)}, health, progress, stage)
        if writes and (stopping or done == config.steps or done % args.checkpoint_every == 0):
            run.save(done, args.keep)
        if stopping:
            message = f"step {done} is saved in {args.output}; go on with --resume"
            raise StopRequested(stop[0] if stop else signal.SIGTERM, message)
        if writes and args.samples_every and (done == config.steps or done % args.samples_every == 0):
            progress.set_description(f"{args.stage}, drawing samples")
            with averaged(trained, average):
                stage.sheet(args.output / "samples" / f"{done:06d}.png")
            progress.set_description(args.stage)
            log.show(done)
    if writes:
        with averaged(trained, average):
            stage.export(args.output)
        print(f"{args.output}: {args.stage} is trained, {config.steps} steps")


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant, then linear to zero over the last `decay` of all steps."""
    left = (config.steps - step) / max(config.steps * config.decay, 1e-9)
    return min(1.0, (step + 1) / max(config.warmup, 1), left)


@contextmanager
def averaged(trained: dict[str, torch.Tensor], average: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the parameters hold their moving average."""
    def swap() -> None:
        for name, p in trained.items():
            if p is not average[name]:
                p.data, average[name].data = average[name].data, p.data
    swap()
    try:
        yield
    finally:
        swap()


def settings_of(args: argparse.Namespace, stage: Stage) -> dict:
    """What a run's config.json says about it."""
    return {"stage": args.stage, "preset": args.preset, "seed": args.seed, "code": git_describe(),
            **{name: value and value.name for name in ("weights", "moa", "data")
               for value in [getattr(args, name)]},
            "torch": torch.__version__, "device": str(stage.device), "graph": args.graph,
            "processes": distributed.world_size(), **asdict(stage.config)}


def git_describe() -> str:
    """The commit of this code, so that an edited run stays identifiable."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()
