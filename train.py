"""Train one stage and write its weights.

    python train.py vae   --output runs/vae
    python train.py clip  --output runs/clip  --weights runs/vae
    python train.py prior --output runs/prior --weights runs/clip
    python train.py moa   --output runs/moa   --weights runs/prior
    python train.py controlnet --output runs/controlnet --weights runs/prior
    python train.py judge --output runs/judge
    python train.py lora  --output runs/lora  --weights runs/prior

    torchrun --nproc-per-node 4 train.py moa --output runs/moa --weights runs/prior

A run is a pure function of its seed: stop it at any moment and `--resume` goes on to the same
weights. `torchrun` shares each batch between processes, on one machine or more: same run, up to
rounding. On a CPU, one process per core is faster than one process with as many threads. A process
that dies ends the others; with `torchrun --max-restarts N` they start again and go on by themselves.
The output folder holds config.json, metrics.jsonl, checkpoints/ (named by their step), samples/, where
TensorBoard is installed tensorboard/, lock, which lets no second process write there, and the weights,
those of --weights too, so each run's folder is the next one's --weights; of judge and lora only their
own file.

Exit status, of a process without `torchrun`: 0 trained, or saved and stopped by SIGTERM as on a machine
that is taken away; 2 an error (one line on stderr); 130 saved and stopped by SIGINT; 143 SIGTERM before
the first step.
"""
import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from allocator import reuse_memory
from errors import one_line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "clip", "prior", "moa", "controlnet", "lora", "judge"],
                        help="what is trained; --preset sd15 has moa and lora")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER",
                        help="folder of the run: a new one, or with --resume that of an earlier run")
    parser.add_argument("--preset", default="toyworld", choices=["toyworld", "sd15"],
                        help="sizes and hyperparameters (default toyworld)")
    parser.add_argument("--weights", type=Path, metavar="FOLDER",
                        help="folder with the models that the stage builds on (all but vae and judge)")
    parser.add_argument("--moa", type=Path, metavar="FILE",
                        help="MoA file to go on from (stage moa; default: from the base model)")
    parser.add_argument("--data", type=Path, metavar="FOLDER",
                        help="dataset in FastComposer's layout (default: the small world, rendered)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER",
                        help="keep latents, text states and image features of --data there, so that a step "
                             "is the UNet alone; augmentations are then drawn once (prior, moa, lora)")
    parser.add_argument("--samples", type=int, metavar="N",
                        help="how many samples to render (default: the preset's) or to read (default: all of "
                             "--data)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: the preset's)")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="pictures per step, of all processes together (default: the preset's)")
    parser.add_argument("--accumulate", type=int, metavar="N",
                        help="each process works on its share of a batch in N parts, to save memory "
                             "(default: the preset's)")
    parser.add_argument("--graph", action="store_true",
                        help="replay the step as a CUDA graph: a small model on a GPU waits for Python "
                             "otherwise (prior, moa, controlnet, lora; not with --preset sd15)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and noise (default 0)")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS",
                        help="steps from line to line of metrics.jsonl (default 50)")
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS",
                        help="steps from one checkpoint and sample sheet to the next (default 1000)")
    parser.add_argument("--keep", type=int, default=1, metavar="N",
                        help="how many checkpoints stay, the newest (default 1)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    args = parser.parse_args()
    for name in ("samples", "steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.seed < 2 ** 32:
        parser.error(f"--seed must be in 0..{2 ** 32 - 1}, not {args.seed}")
    return args


def git_describe() -> str:
    """The commit of this code, so that an edited run stays identifiable."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


PATIENCE = 10  # steps in a row whose gradient is not finite, and which are left out, before a run ends


class StopRequested(Exception):
    """A signal arrived; the arguments are its number and what to tell."""


MAIN_PROCESS = os.getpid()


def leave(number: int, frame) -> None:
    """End before the first step. The worker processes that read data inherit this: they end silently and at
    once, since Python drops an exception that is raised while a process is being forked, and their pool
    would wait for them forever."""
    if os.getpid() != MAIN_PROCESS:
        os._exit(128 + number)
    sys.exit(128 + number)


def main() -> None:
    args = parse_args()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, leave)
    from training import distributed
    from data.fastcomposer import read_ids
    from pipeline import pick_device
    from training import STAGES, RecordedStep, StageError, check_graph, check_preset, make_config
    reuse_memory()
    until_the_end = ExitStack()
    try:
        if args.data is not None:
            count = len(read_ids(args.data, "train"))
            args.samples = min(args.samples or count, count)
        config = make_config(args.preset, args.stage, steps=args.steps, batch_size=args.batch_size,
                             samples=args.samples, accumulate=args.accumulate)
        check_preset(args.preset, args.weights)
        device = pick_device(args.device)
        if args.graph:
            check_graph(STAGES[args.stage], config, device)
        device = distributed.start(device)
        with distributed.first_rank_first():
            prepare_output(args)
            if distributed.rank() == 0:
                until_the_end.enter_context(claimed(args.output))
            stage = STAGES[args.stage](config, args.seed, device, args.weights, args.data, args.moa,
                                       args.cache)
            backward = RecordedStep(stage) if args.graph else stage.backward
        stage.prepare()
        train(stage, backward, args)
    except (StageError, OSError, ValueError) as error:
        unnamed = isinstance(error, OSError) and error.errno and not error.filename  # of a file that is open
        place = f"{args.output}: " if unnamed else ""
        print("error:", one_line(f"{place}{error}"), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if "allocate" not in str(error):  # on a CPU, torch has no error class for it
            raise
        larger = "" if args.graph else "a larger --accumulate, or "
        print(f"error: not enough memory: give {larger}a smaller --batch-size", file=sys.stderr)
        sys.exit(2)
    except (StopRequested, KeyboardInterrupt) as stop:
        number, message = stop.args or (signal.SIGINT, "before the first step")
        print("stopped:", message, file=sys.stderr)
        sys.exit(0 if number == signal.SIGTERM else 128 + number)
    except SystemExit:
        cause = ", as torchrun does when another process has ended" if distributed.launch() else ""
        print(f"stopped: before the first step, by SIGTERM{cause}", file=sys.stderr)
        raise
    finally:
        until_the_end.close()
        distributed.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def prepare_output(args: argparse.Namespace) -> None:
    """Look what is in the run's folder. An older run is only ever continued, weights are left alone.

    A run of this very `torchrun`, which starts its processes again when one has died, goes on as with
    --resume.
    """
    from training import distributed
    from models.load import read_config
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file: give a folder's name")
    held = list_checkpoints(args.output)
    if held and not args.resume and distributed.launch():
        args.resume = read_config(args.output).get("training", {}).get("launch") == distributed.launch()
    if args.resume and not held:
        raise ValueError(f"--resume: there is no checkpoint in {args.output / 'checkpoints'}")
    if not args.resume and held:
        raise ValueError(f"{args.output} holds a run already: give --resume or another --output")
    if not args.resume and any(args.output.glob("*.safetensors")):
        raise ValueError(f"{args.output} holds weights already: give another --output")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside, a folder is there, and no other process can train into it; a killed one holds nothing any
    more. If it was made for this and nothing was written, it goes again. Raises ValueError where
    another one trains there."""
    path, new = folder / "lock", [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                # A kind of lock that the readers, who are forks of this process, do not inherit.
                os.lockf(file, os.F_TLOCK, 0)
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(f"another process is training into {folder}: stop it, or give another "
                                 "--output") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # the first that is not empty
                for each in new:
                    each.rmdir()
    finally:
        os.close(file)


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of the run in a folder, oldest first."""
    found = [path for path in (output / "checkpoints").glob("*.pt") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def train(stage, backward: Callable, args: argparse.Namespace) -> None:
    """The loop that all stages share; `backward` is the stage's, or takes its place."""
    import torch
    from tqdm import tqdm

    from training import distributed
    from curves import Curves
    from models.load import read_config, write_json

    config, device, writes = stage.config, stage.device, distributed.rank() == 0
    settings = {"stage": args.stage, "preset": args.preset, "seed": args.seed, "code": git_describe(),
                "weights": args.weights and args.weights.name, "moa": args.moa and args.moa.name,
                "data": args.data and args.data.name, "torch": torch.__version__, "device": str(device),
                "graph": args.graph, "processes": distributed.world_size(), "launch": distributed.launch(),
                **asdict(config)}
    trained = {name: p for name, p in stage.module.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas,
                                  weight_decay=config.weight_decay, fused=True)
    averages = {name: p.detach().clone() for name, p in trained.items()} if config.ema else trained
    average = list(averages.values())
    first, written, run = 0, {}, run_identity(args, config)
    log_path, curves = args.output / "metrics.jsonl", None
    if args.resume:  # before anything is written
        first = load_checkpoint(list_checkpoints(args.output)[-1], run, trained, averages, optimizer)
        written = read_config(args.output)
    if writes:
        for name in ("checkpoints", "samples"):
            (args.output / name).mkdir(parents=True, exist_ok=True)
        for left in args.output.rglob(".*.tmp"):  # by a process that was killed while it wrote
            left.unlink()
        write_json({**written, "training": settings}, args.output / "config.json")
        print(json.dumps(settings))
        cut_metrics(log_path, first)
        curves = Curves(args.output, first)

    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stop.append(received))
    metrics, failed, skipped = {}, 0, 0
    progress = tqdm(range(first, config.steps), args.stage, config.steps, initial=first, unit="step",
                    disable=not writes)
    with progress, open(log_path if writes else os.devnull, "a", encoding="utf-8") as log:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate_factor(step, config)
            losses = []
            for index in range(config.accumulate):
                with distributed.turn(index, config.accumulate):
                    loss, parts = backward(step)
                losses.append({"loss": loss, **parts})
            stopping = distributed.average_gradients(parameters, bool(stop))
            done = step + 1
            logged = done % args.log_every == 0 or done == config.steps
            health = stage.health() if logged else {}
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            if torch.isfinite(norm):
                failed = 0
                optimizer.step()
            else:
                failed, skipped = failed + 1, skipped + 1
            if failed > PATIENCE:
                raise ValueError(f"the gradient was not finite in {failed} steps in a row, up to step "
                                 f"{step}: lower the learning rate and go on from the newest of "
                                 f"{args.output / 'checkpoints'}")
            optimizer.zero_grad(set_to_none=True)
            if config.ema:
                decay = min(config.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            if logged:
                means = {k: torch.stack([part[k] for part in losses]).mean() for k in losses[0]}
                metrics = {"step": done, **distributed.mean(means), "skipped": skipped,
                           "lr": optimizer.param_groups[0]["lr"], "gradient_norm": float(norm),
                           **{name: readable(value) for name, value in health.items()},
                           "memory_gb": readable(peak_memory(device) / 1e9)}
                rate = progress.format_dict["rate"]  # absent in the first moments
                metrics["images_per_second"] = round((rate or 0) * config.batch_size, 1)
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                if writes:
                    curves.add(metrics)
                progress.set_postfix({k: f"{v:.4g}" for k, v in metrics.items() if k in ("loss", *parts)})
            if writes and (stopping or done == config.steps or done % args.checkpoint_every == 0):
                state = {"run": run, "step": done, "parameters": trained, "average": averages,
                         "optimizer": optimizer.state_dict(), "moa": stage.moa_config()}
                save_checkpoint(args.output, state, args.keep)
                if not stopping:
                    with averaged(parameters, average):
                        stage.sheet(args.output / "samples" / f"{done:06d}.png")
                    curves.show(args.output / "samples", done)
            if stopping:
                message = f"step {done} is saved in {args.output}; go on with --resume"
                raise StopRequested(stop[0] if stop else signal.SIGTERM, message)
    if writes:
        with averaged(parameters, average):
            stage.export(args.output)
        print(f"{args.output}: {args.stage} is trained, {config.steps} steps")


def learning_rate_factor(step: int, config) -> float:
    """Linear warm-up, then constant, then linear to zero over the last `decay` of all steps."""
    left = (config.steps - step) / max(config.steps * config.decay, 1e-9)
    return min(1.0, (step + 1) / max(config.warmup, 1), left)


class averaged:
    """Inside, the parameters hold their moving average."""

    def __init__(self, parameters: list, average: list):
        self.parameters, self.average = parameters, average

    def swap(self) -> None:
        for p, a in zip(self.parameters, self.average, strict=True):
            if p is not a:
                p.data, a.data = a.data, p.data

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *exception) -> None:
        self.swap()


def peak_memory(device) -> int:
    """The most memory, in bytes, that this process has had so far: on the GPU, else on this machine."""
    import torch
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def readable(value: float | list[float]) -> float | list[float]:
    """Five significant digits."""
    return [readable(v) for v in value] if isinstance(value, list) else float(f"{value:.5g}")


def cut_metrics(path: Path, step: int) -> None:
    """Drop what was logged after `step`: a resumed run logs it again."""
    from models.load import write_whole
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))


def run_identity(args: argparse.Namespace, config) -> dict:
    """What has to be equal for a run to be the same run; for the weights, a checksum of their bytes."""
    from models.load import PARTS
    checksum, parts = 0, [args.weights / f"{part}.safetensors" for part in PARTS if args.weights]
    for path in [*parts, *([args.moa] if args.moa else [])]:
        if path.exists():
            checksum = zlib.crc32(path.read_bytes(), checksum)
    recipe = {k: v for k, v in asdict(config).items() if k not in ("accumulate", "checkpointing")}
    return {"stage": args.stage, "preset": args.preset, "seed": args.seed, **recipe, "weights": checksum,
            "data": args.data and str(args.data.resolve()), "cache": args.cache is not None}


def save_checkpoint(output: Path, state: dict, keep: int) -> None:
    """Everything a run needs to go on; of older checkpoints `keep` - 1 stay. There is no random state:
    noise is a function of the step."""
    import torch

    from models.load import write_whole
    state = {**state, **{part: {name: p.detach() for name, p in state[part].items()}
                         for part in ("parameters", "average")}}
    write_whole(output / "checkpoints" / f"{state['step']:06d}.pt",
                lambda temporary: torch.save(state, temporary))
    for old in list_checkpoints(output)[:-keep]:
        old.unlink()


def load_checkpoint(path: Path, run: dict, trained: dict, averages: dict, optimizer) -> int:
    """Restore a run in place; returns its step. Raises WeightsError when the file is broken, ValueError
    when it is another run's."""
    import torch

    from models.load import read_checkpoint
    state = read_checkpoint(path)
    different = [f"{k} {v}, not {run.get(k)}" for k, v in state["run"].items() if v != run.get(k)]
    pairs = [(trained, state["parameters"]), (averages, state["average"])]
    ours, moments = optimizer.state_dict(), state["optimizer"].get("state")
    wanted = {number: {"step": torch.empty(()), "exp_avg": p, "exp_avg_sq": p}
              for number, p in enumerate(trained.values())}
    if not (all(same_shapes(*pair) for pair in pairs) and isinstance(moments, dict) and all(
            number in wanted and same_shapes(wanted[number], found) for number, found in moments.items())):
        different.append("a model of other sizes")
    if different:
        raise ValueError(f"{path} is of another run: {', '.join(different)}")
    with torch.no_grad():
        for values, found in pairs:
            for name, value in values.items():
                value.copy_(found[name])
    optimizer.load_state_dict({**ours, "state": moments})
    return state["step"]


def same_shapes(wanted: dict, found) -> bool:
    """Whether `found` has tensors of these names and shapes, in this order: an optimizer's state knows its
    tensors by nothing else."""
    return isinstance(found, dict) and [(name, value.shape) for name, value in wanted.items()] == [
        (name, getattr(value, "shape", None)) for name, value in found.items()]


if __name__ == "__main__":
    main()
