"""What `train.py` needs of what it trains."""
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.sample import Sample, Samples, batch_indices
from data.stream import Stream
from models.attention import FeedForward
from models.load import write_whole
from models.resnet import ResnetBlock
from training.distributed import share, world_size
from training.presets import StageError, TrainConfig


class Stage:
    """Something to train. `module` holds it: what is trained is what has requires_grad.

    All randomness is a function of the seed and the step, so that a run needs no random state to go on.
    """

    module: nn.Module
    reads: tuple[str, ...] = ("data",)  # which of --weights, --data, --cache and --moa the stage can use
    needs_weights = False
    recordable = False  # whether a CUDA graph can hold `loss`: the device must never wait for the host
    shareable = True  # whether the loss is a mean over samples, which several processes can share

    def __init__(self, config: TrainConfig, seed: int, device: torch.device, samples: Samples,
                 weights: Path | None = None, moa: Path | None = None, cache: Path | None = None):
        self.config, self.seed, self.device, self.samples = config, seed, device, samples
        self.weights, self.moa, self.cache = weights, moa, cache
        parts = world_size() * config.accumulate
        if parts > 1 and not self.shareable:
            raise StageError("the loss of this stage is not a mean over its samples: run it in one process, "
                             "without --accumulate")
        if config.batch_size % parts:
            raise StageError(f"--batch-size {config.batch_size} must be a multiple of {parts}, the processes "
                             "times --accumulate")
        self.stream = Stream(samples, lambda number: self.order(*divmod(number, config.accumulate)))
        torch.manual_seed(seed)  # initial weights
        self.setup()
        self.module.to(device)

    # What a stage is.

    def setup(self) -> None:
        """Build `module`, and what else it takes to train it."""
        raise NotImplementedError

    def batch(self, step: int, turn: int = 0) -> dict[str, Tensor]:
        """All that the loss is computed from, on the device. A turn is one of the `config.accumulate`
        micro-batches of a step; this is the process's share of it."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what of it is logged, by name."""
        raise NotImplementedError

    def sheet(self, path: Path) -> None:
        """A picture of what the stage can do by now."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Write the trained weights."""
        raise NotImplementedError

    # What it may add.

    def health(self) -> dict[str, float | list[float]]:
        """More about the last step for metrics.jsonl, by name. All processes call it together, after
        the backward pass and before the gradients are clipped."""
        return {}

    def moa_config(self) -> dict | None:
        """What a MoA file made of a checkpoint says about itself, where the stage trains one."""
        return None

    # What all have.

    def autocast(self) -> torch.autocast:
        """Mixed precision: on CUDA always, elsewhere where the preset says."""
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.config.bf16 or self.device.type == "cuda")

    def read(self, step: int, turn: int) -> list[Sample]:
        """The samples of a turn."""
        return self.stream.batch(step * self.config.accumulate + turn)

    def order(self, step: int, turn: int) -> np.ndarray:
        """(B, 2): index and epoch of the samples of a turn."""
        size, count = self.config.batch_size, len(self.samples)
        epochs = (step * size + np.arange(size)) // count
        return self.share(np.stack([batch_indices(self.seed, step, size, count), epochs], axis=1), turn)

    def share(self, values: Tensor | np.ndarray, turn: int) -> Tensor | np.ndarray:
        """A turn's part of what is drawn for the whole batch."""
        return share(values, turn, self.config.accumulate)

    def noise(self, shape: torch.Size, generator: torch.Generator, turn: int) -> Tensor:
        """A turn's share, of `shape`, of the noise of a step."""
        whole = torch.randn(self.config.batch_size, *shape[1:], generator=generator)
        return self.share(whole, turn).to(self.device)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def save_grid(rows: list[np.ndarray], path: Path) -> None:
    """Rows of pictures (N, H, W, 3) uint8 as one PNG."""
    grid = np.concatenate([rearrange(row, "n h w c -> h (n w) c") for row in rows])
    write_whole(path, lambda temporary: Image.fromarray(grid).save(temporary, format="PNG"))


def checkpoint_blocks(unet: nn.Module) -> None:
    """Keep less for the backward pass, in place; gradients stay the same.

    Not of the attention: it is watched by hooks that are gone in the backward pass, and its fused
    kernel keeps little.
    """
    for module in unet.modules():
        if isinstance(module, (ResnetBlock, FeedForward)):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


# The sample sheets always show the same prompts.
SHEET_GUIDANCE = 4.0
SWAP_PROMPTS = ("standing on the beach", "riding a bike in a park", "reading a book in the snow",
                "holding a bouquet of roses in Paris", "sitting on a sofa in a laboratory",
                "drinking boba in a night market", "waving on a mountain", "running in a lavender farm")
