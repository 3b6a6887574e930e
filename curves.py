"""A run's numbers and pictures in TensorBoard, where it is installed."""
from pathlib import Path

import numpy as np
from PIL import Image

LARGEST = 1600  # pixels of a picture's longer side: TensorBoard keeps every one of them


class Curves:
    """Writes to `tensorboard/` in the run's folder; does nothing without TensorBoard."""

    def __init__(self, output: Path, first: int):
        """`first`: the steps that are done. What was written after them, before a run was stopped,
        is not shown any more."""
        self.writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("curves: metrics.jsonl; with `pip install tensorboard`, from the next start on, also "
                  f"tensorboard --logdir {output}")
            return
        print(f"curves: tensorboard --logdir {output}")
        self.writer = SummaryWriter(output / "tensorboard", purge_step=first + 1)

    def add(self, metrics: dict[str, float | list[float]]) -> None:
        """A line of metrics.jsonl; the values of a list get tags of their own, as layer_00."""
        if self.writer is None:
            return
        for name, value in metrics.items():
            values = {name: value}
            if isinstance(value, list):
                values = {f"{name}/layer_{i:02d}": v for i, v in enumerate(value)}
            for tag, scalar in values.items():
                if tag != "step":
                    self.writer.add_scalar(tag, scalar, metrics["step"])
        self.writer.flush()  # the process may be killed before the next line

    def show(self, folder: Path, step: int) -> None:
        """The pictures of a step in the run's samples/, such as 000500.png and 000500_routing.png."""
        if self.writer is None:
            return
        for path in sorted(folder.glob(f"{step:06d}*.png")):
            with Image.open(path) as image:
                image.thumbnail((LARGEST, LARGEST))
                self.writer.add_image(f"samples{path.stem[6:]}", np.array(image), step, dataformats="HWC")
        self.writer.flush()
