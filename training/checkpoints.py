"""Everything that a run needs to go on, in checkpoints/ of its folder, named by step."""
import zlib
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from models.load import PARTS, WeightsError, read_checkpoint, write_whole
from training.stage import Stage


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of the run in a folder, oldest first."""
    found = [path for path in (output / "checkpoints").glob("*.pt") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


class Run:
    """What is trained, its moving averages, the buffers and the optimizer, all changed in place. There is no
    random state: noise is a function of the step."""

    def __init__(self, output: Path, name: str, stage: Stage, trained: dict[str, Tensor],
                 averages: dict[str, Tensor], optimizer: torch.optim.Optimizer):
        self.output, self.stage, self.optimizer = output, stage, optimizer
        self.trained, self.averages = trained, averages
        # What has to be equal for a run to be the same run. Weights by their checksum and data by their
        # contents, not by their paths: both may be moved.
        checksum, weights = 0, [stage.weights / f"{part}.safetensors" for part in PARTS if stage.weights]
        for path in [*weights, *([stage.moa] if stage.moa else [])]:
            if path.exists():
                checksum = zlib.crc32(path.read_bytes(), checksum)
        recipe = {k: v for k, v in asdict(stage.config).items() if k not in ("accumulate", "checkpointing")}
        self.identity = {"stage": name, "seed": stage.seed, **recipe, "weights": checksum,
                         "pictures": stage.samples.key}

    def buffers(self) -> dict[str, Tensor]:
        """What the modules keep besides parameters, such as a router's running mean."""
        module = self.stage.module
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        return {name: value for name, value in module.state_dict().items() if name not in parameters}

    def save(self, step: int, keep: int) -> None:
        """Write a checkpoint; of older ones `keep` - 1 stay."""
        parts = {name: {key: p.detach() for key, p in values.items()}
                 for name, values in (("parameters", self.trained), ("average", self.averages),
                                      ("buffers", self.buffers()))}
        state = {"run": self.identity, "step": step, **parts, "optimizer": self.optimizer.state_dict(),
                 "moa": self.stage.moa_config()}
        write_whole(self.output / "checkpoints" / f"{step:06d}.pt",
                    lambda temporary: torch.save(state, temporary))
        for old in list_checkpoints(self.output)[:-keep]:
            old.unlink()

    def resume(self) -> int:
        """Take over the newest checkpoint; returns its step, or 0 without one. Raises WeightsError when the
        file is broken, ValueError when it is another run's."""
        if not (found := list_checkpoints(self.output)):
            return 0
        path = found[-1]
        try:
            state = read_checkpoint(path)
        except WeightsError as error:
            cure = f"remove it, and --resume goes on from {found[-2]}" if found[1:] else "start the run anew"
            raise WeightsError(f"{error}; {cure}") from error
        different = [f"{k} {state['run'].get(k)}, not {v}" for k, v in self.identity.items()
                     if k in state["run"] and state["run"][k] != v]
        if different:
            raise ValueError(f"{path} is of another run: {', '.join(different)}")
        try:
            moments = state["optimizer"]["state"]
            for p, moment in zip(self.trained.values(), moments.values(), strict=False):
                if not moment["exp_avg"].shape == moment["exp_avg_sq"].shape == p.shape:
                    raise KeyError("optimizer")
            with torch.no_grad():
                for values, read in ((self.trained, state["parameters"]), (self.averages, state["average"]),
                                     (self.buffers(), state.get("buffers", {}))):
                    for name, value in values.items():
                        if value.shape != read[name].shape:
                            raise KeyError(name)
                        value.copy_(read[name])
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is of another run: a model of other sizes, {error}") from error
        return state["step"]
