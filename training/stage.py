"""What all stages share."""
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from training import distributed
import toyworld
from data.dataset import Cache, Sample, batch_indices, render_cache
from data.fastcomposer import Folder
from data.stream import Reader, Samples, Stream, worker_count
from training.distributed import share, turn, turn_index, world_size
from models.attention import FeedForward
from models.clip_text import Tokenizer
from models.load import read_config, write_json, write_whole
from models.resnet import ResnetBlock
from training.presets import StageError, TrainConfig


def step_generator(seed: int, step: int) -> torch.Generator:
    """All randomness of one step, so that a run needs no random state to go on."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def save_grid(rows: list[np.ndarray], path: Path) -> None:
    """Rows of pictures (N, H, W, 3) uint8 as one PNG."""
    grid = np.concatenate([rearrange(row, "n h w c -> h (n w) c") for row in rows])
    write_whole(path, lambda temporary: Image.fromarray(grid).save(temporary, format="PNG"))


@dataclass(frozen=True)
class Schedule:
    """Which of `count` samples this process works on, turn by turn of step by step."""

    config: TrainConfig
    seed: int
    count: int

    def order(self, place: tuple[int, int]) -> np.ndarray:
        """(B, 2): index and epoch of the samples at a place (step, turn)."""
        step, index = place
        size = self.config.batch_size
        epochs = (step * size + np.arange(size)) // self.count
        with turn(index, self.config.accumulate):
            return share(np.stack([batch_indices(self.seed, step, size, self.count), epochs], axis=1))

    def after(self, place: tuple[int, int]) -> tuple[int, int] | None:
        """The place that follows; None at the end of the run."""
        step, index = place
        if index + 1 < self.config.accumulate:
            return step, index + 1
        return (step + 1, 0) if step + 1 < self.config.steps else None


class Stage:
    """`module` holds what is trained; `loss(step)` is a pure function of it and the step."""

    module: nn.Module
    reads: tuple[str, ...] = ("data",)  # which of --weights, --data, --cache and --moa the stage can use
    size = toyworld.SIZE  # of its pictures, in pixels
    samples: Samples
    stream: Stream | None = None  # where samples are read from while training
    recordable = False  # whether a CUDA graph can hold the step: there are `inputs` and `loss_of`
    shareable = True  # whether the loss is a mean over samples, which several processes can share

    def __init__(self, config: TrainConfig, seed: int, device: torch.device,
                 weights: Path | None, data: Path | None, moa: Path | None = None,
                 cache: Path | None = None):
        self.config, self.seed, self.device = config, seed, device
        self.weights, self.data, self.moa, self.cache = weights, data, moa, cache
        for name in ("weights", "data", "moa", "cache"):
            if getattr(self, name) is not None and name not in self.reads:
                raise StageError(f"this stage cannot use --{name}: leave it out")
        parts = world_size() * config.accumulate
        if parts > 1 and not self.shareable:
            raise StageError("the loss of this stage is not a mean over its samples: run it in one process, "
                             "without --accumulate")
        if config.batch_size % parts:
            raise StageError(f"--batch-size {config.batch_size} must be a multiple of {parts}, the processes "
                             "times --accumulate")
        torch.manual_seed(seed)  # initial weights
        self.setup()
        self.module.to(device)

    def setup(self) -> None:
        """Build `module` and the data."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What all processes do together after `setup`."""

    def training_samples(self) -> Samples:
        """Those of the folder --data, else rendered scenes."""
        if self.data is None:
            if self.size != toyworld.SIZE:
                raise StageError(f"{self.weights} draws {self.size} pixels, the small world's scenes have "
                                 f"{toyworld.SIZE}: give --data FOLDER")
            return self.rendered("scenes", self.config.samples)
        seed = self.seed if self.cache is None else 0  # a cache serves runs with any seed
        samples = Folder(self.data, self.config.samples, self.size, max_people=self.config.max_people,
                         augmented=self.config.augment, seed=seed)
        self.stream = Stream(samples, Schedule(self.config, self.seed, len(samples)), worker_count())
        return samples

    def batch(self, step: int) -> list[Sample]:
        """This process's samples of a step."""
        if self.stream is not None:
            return self.stream.batch((step, turn_index()))
        return [self.samples.read(index, epoch) for index, epoch in self.order(step)]

    def order(self, step: int) -> np.ndarray:
        """(B, 2): index and epoch of this process's samples of a step."""
        return Schedule(self.config, self.seed, len(self.samples)).order((step, turn_index()))

    def rendered(self, kind: str, count: int, split: str = "train") -> Cache:
        """Pictures of the small world."""
        return render_cache(kind, count, split)

    def first_samples(self, count: int) -> Iterator[Sample]:
        """The first samples there are, at most `count`."""
        reader = Reader(self.samples)
        for index in range(min(count, len(self.samples))):
            sample, _ = reader[index, 0]
            if sample is not None:
                yield sample

    def noise(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """This process's share, of `shape`, of the noise of a step."""
        whole = torch.randn(self.config.batch_size, *shape[1:], generator=generator)
        return share(whole).to(self.device)

    def autocast(self) -> torch.autocast:
        """Mixed precision, for what makes the loss: on CUDA always, elsewhere where the preset says."""
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.config.bf16 or self.device.type == "cuda")

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step and its parts by name."""
        raise NotImplementedError

    def backward(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up the gradients of one turn of a step; its loss and the parts by name, without gradients."""
        with self.autocast():
            loss, parts = self.loss(step)
        (loss / self.config.accumulate).backward()
        return loss.detach(), {name: part.detach() for name, part in parts.items()}

    def health(self) -> dict[str, float | list[float]]:
        """More about the last step for metrics.jsonl, by name. All processes call it together, after
        the backward pass and before the gradients are clipped."""
        if self.stream is None:
            return {}
        # On the device: between GPUs nothing else can be exchanged.
        broken = distributed.mean({"broken": torch.tensor(self.stream.broken, device=self.device)})["broken"]
        return {"broken": round(broken * world_size())}  # samples that others were read in place of

    def moa_config(self) -> dict | None:
        """What a MoA file made of a checkpoint says about itself, where the stage trains one."""
        return None

    def sheet(self, path: Path) -> None:
        """A picture of what the stage can do by now."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Write the trained weights."""
        raise NotImplementedError


def checkpoint_blocks(unet: nn.Module) -> None:
    """Keep less for the backward pass, in place; gradients stay the same.

    Not of the attention: it is watched by hooks that are gone in the backward pass, and its fused
    kernel keeps little.
    """
    for module in unet.modules():
        if isinstance(module, (ResnetBlock, FeedForward)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def tokenize_all(tokenize: Tokenizer, captions: list[str]) -> Tensor:
    """(N,) captions, many of them equal -> (N, 77) int64."""
    unique = sorted(set(captions))
    rows = {caption: i for i, caption in enumerate(unique)}
    return tokenize(unique)[[rows[caption] for caption in captions]]


def update_config(folder: Path, **values) -> None:
    """Add to a folder's config.json."""
    write_json({**read_config(folder), **values}, folder / "config.json")


# The sample sheets always show the same prompts; guidance as in the shipped config.
SHEET_GUIDANCE = 4.0
SWAP_PROMPTS = ("standing on the beach", "riding a bike in a park", "reading a book in the snow",
                "holding a bouquet of roses in Paris", "sitting on a sofa in a laboratory",
                "drinking boba in a night market", "waving on a mountain", "running in a lavender farm")
SHEET_PROMPTS = [f"a {noun} {what}" for noun in ("woman", "man", "girl") for what in SWAP_PROMPTS] + [
    f"{who} {what}" for who in ("a man and a woman", "a woman and a boy") for what in (
        "standing on the beach", "shaking hands in Paris", "dancing on Mars", "reading a book in the snow",
        "sitting on a sofa in the wild west", "running in a park", "waving in a night market",
        "holding a bouquet of roses in a lavender farm")]
