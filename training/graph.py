"""A training step as a CUDA graph: recorded once, then replayed by a single call.

A small model on a large GPU waits for Python, which names some thousand kernels for every step.
"""
import torch
from torch import Tensor

from training.presets import StageError, TrainConfig
from training.stage import Stage

WARM_UP = 3  # runs before recording, in which libraries choose kernels and take their memory
# What a graph cannot hold, unless it is this.
PLAIN = {"accumulate": 1, "checkpointing": False, "image_layers": 0}


def check_graph(stage: type[Stage], config: TrainConfig, device: torch.device) -> None:
    """Raise StageError where the step of a stage cannot be recorded."""
    if device.type != "cuda":
        raise StageError(f"--graph is for a CUDA GPU, this is {device}: leave it out")
    if not stage.recordable:
        raise StageError("--graph cannot hold the step of this stage: leave it out")
    for name, plain in PLAIN.items():
        if (value := getattr(config, name)) != plain:
            raise StageError(f"--graph cannot hold a step with {name} {value}, whether from the command line "
                             "or from the preset: leave --graph out")


class RecordedStep:
    """Loss and gradients of a batch, for stages that pass `check_graph`.

    Every call writes inputs, loss and gradients to the same memory.
    """

    def __init__(self, stage: Stage):
        self.stage = stage
        self.parameters = [p for p in stage.module.parameters() if p.requires_grad]
        self.graph: torch.cuda.CUDAGraph | None = None
        # What the graph reads and writes, from the first call on.
        self.batch: dict[str, Tensor] = {}
        self.found: tuple[Tensor, dict[str, Tensor]] = ()
        self.gradients: list[Tensor | None] = []

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Leave the gradients in the parameters; the loss and its parts by name."""
        if self.graph is None:
            self.record(batch)
        for name, value in batch.items():
            self.batch[name].copy_(value)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return self.found

    def record(self, batch: dict[str, Tensor]) -> None:
        """Make the graph, of a batch of these shapes."""
        self.batch = {name: value.clone() for name, value in batch.items()}
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self.run()
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = self.run()
        self.gradients = [p.grad for p in self.parameters]

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What is recorded: the loss, and its gradients in tensors of their own."""
        for p in self.parameters:  # a gradient that is there would be added to
            p.grad = None
        with self.stage.autocast():
            loss, parts = self.stage.loss(self.batch)
        loss.backward()
        return loss.detach(), {name: part.detach() for name, part in parts.items()}
