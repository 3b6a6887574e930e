"""Draw runs of `train.py` side by side from their metrics.jsonl; needs matplotlib.

    python docs/curves.py runs/a runs/b --names healthy "another seed" --output curves.png
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.errors import Parser, fail
from sample import check_picture

PANELS = {
    "masked": "masked loss",
    "object": "object loss",
    "prior_weight_people": "prior's weight on people",
    "prior_weight_background": "prior's weight on the background",
    "gradient_norm_experts": "gradient of the experts",
    "subject_attention_by_layer": "attention to the subject's token",
}


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--names", nargs="+", metavar="NAME",
                        help="what to call them (default: the folders' names)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="PNG to write")
    args = parser.parse_args()
    args.names = args.names or [run.name for run in args.runs]
    if len(args.names) != len(args.runs):
        parser.error(f"{len(args.names)} names for {len(args.runs)} runs")
    return args


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """A running mean that ends where the values end."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "full")[:len(values)] / np.convolve(
        np.ones(len(values)), kernel, "full")[:len(values)]


def read_run(run: Path) -> list[dict]:
    """The logged steps of a run. Raises ValueError where there are none."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. Give a folder that train.py has written"
                         ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not what train.py writes: {error}") from error


def main() -> None:
    args = parse_args()
    try:
        check_picture("--output", args.output)
        runs = [read_run(run) for run in args.runs]
    except ValueError as error:
        fail(error)
    try:
        import matplotlib
    except ImportError:
        fail("this needs matplotlib: pip install -r requirements-dev.txt")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        for name, run in zip(args.names, runs, strict=True):
            points = [(line["step"], np.mean(line[key])) for line in run if key in line]
            if points:
                steps, values = np.array(points).T
                axis.plot(steps, smooth(values), label=name, linewidth=1.4)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.set_xlabel("step", fontsize=8)
    axes.flat[4].set_yscale("log")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
