"""What a run tells about itself: config.json, metrics.jsonl, samples/, and TensorBoard where there is one."""
import json
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from models.load import read_config, write_json, write_whole
from training.stage import Stage

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None

LARGEST = 1600  # pixels of a picture's longer side: TensorBoard keeps every one of them


def settings_table(settings: dict) -> str:
    """The settings that are on, four in a line; config.json has all."""
    shown = [f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
             for name, value in settings.items() if value not in (None, ()) and value is not False]
    return "\n".join("  ".join(f"{cell:<25}" for cell in shown[i:i + 4]).rstrip()
                     for i in range(0, len(shown), 4))


class Log:
    """Writes to the folder of a run of which `first` steps are done; what was logged after them goes."""

    def __init__(self, output: Path, settings: dict, first: int):
        self.output, self.path, self.curves = output, output / "metrics.jsonl", None
        for name in ("checkpoints", "samples"):
            (output / name).mkdir(parents=True, exist_ok=True)
        for left in output.rglob(".*.tmp"):  # by a process that was killed while it wrote
            left.unlink()
        written = read_config(output) if first else {}
        codes = [*written.get("training", {}).get("code", "").split(", then "), settings["code"]]
        codes = ", then ".join(code for code in dict.fromkeys(codes) if code)  # it may have been edited
        if codes != settings["code"]:
            print(f"warning: this run goes on with other code than before: {codes}", file=sys.stderr)
        write_json({**written, "training": {**settings, "code": codes}}, output / "config.json")
        print(settings_table(settings))
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]
        write_whole(self.path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))
        if SummaryWriter is not None:
            print(f"curves: tensorboard --logdir {output}")
            self.curves = SummaryWriter(output / "tensorboard", purge_step=first + 1)

    def add(self, metrics: dict[str, float], health: dict[str, float | list[float]], progress: tqdm,
            stage: Stage) -> None:
        """A line of metrics.jsonl; in TensorBoard the values of a list have tags of their own."""
        rate = progress.format_dict["rate"] or 0  # absent in the first moments
        metrics = {**metrics, **{name: readable(value) for name, value in health.items()},
                   "memory_gb": readable(peak_memory(stage.device) / 1e9),
                   "images_per_second": round(rate * stage.config.batch_size, 1)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        progress.set_postfix(loss=f"{metrics['loss']:.4g}")
        if self.curves:
            for name, value in metrics.items():
                if isinstance(value, list):
                    for i, v in enumerate(value):
                        self.curves.add_scalar(f"{name}/layer_{i:02d}", v, metrics["step"])
                elif name != "step":
                    self.curves.add_scalar(name, value, metrics["step"])
            self.curves.flush()  # the process may be killed before the next line

    def show(self, step: int) -> None:
        """TensorBoard gets the pictures of a step in samples/, such as 000500.png and 000500_routing.png."""
        if self.curves:
            for path in sorted((self.output / "samples").glob(f"{step:06d}*.png")):
                with Image.open(path) as image:
                    image.thumbnail((LARGEST, LARGEST))
                    self.curves.add_image(f"samples{path.stem[6:]}", np.array(image), step, dataformats="HWC")
            self.curves.flush()


def peak_memory(device: torch.device) -> int:
    """The most memory, in bytes, that this process has had so far: on the GPU, else on this machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def readable(value: float | list[float]) -> float | list[float]:
    """Five significant digits."""
    return [readable(v) for v in value] if isinstance(value, list) else float(f"{value:.5g}")
