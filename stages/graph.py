"""A training step as a CUDA graph: recorded once, then replayed by a single call.

A small model on a large GPU waits for Python, which names a thousand kernels for every step.
"""
import torch
from torch import Tensor

from stages.presets import StageError
from stages.stage import Stage

WARM_UP = 3  # runs before recording, in which libraries choose kernels and take their memory


class RecordedStep:
    """Takes the place of a stage's `backward`. The gradients lie where they lay at the recording, and a
    replay writes over them."""

    def __init__(self, stage: Stage):
        """Raises StageError where the step cannot be recorded."""
        if stage.device.type != "cuda":
            raise StageError(f"--graph is for a CUDA GPU, this is {stage.device}: leave it out")
        if not stage.recordable:
            raise StageError("--graph cannot hold the step of this stage: leave it out")
        for name, plain in {"accumulate": 1, "checkpointing": False, "image_layers": 0}.items():
            if getattr(stage.config, name) != plain:
                raise StageError(f"--graph cannot hold a step with {name} "
                                 f"{getattr(stage.config, name)}: leave one of both out")
        self.stage = stage
        self.parameters = [p for p in stage.module.parameters() if p.requires_grad]
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step and its parts by name; the next call writes over them."""
        with self.stage.autocast():
            inputs = self.stage.inputs(step)
        if self.graph is None:
            self.record(inputs)
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return self.loss, self.parts

    def record(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self.run()
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss, self.parts = self.run()
        self.gradients = [p.grad for p in self.parameters]

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        for p in self.parameters:  # a gradient that is there would be added to
            p.grad = None
        with self.stage.autocast():
            loss, parts = self.stage.loss_of(self.inputs)
        loss.backward()
        return loss.detach(), {name: part.detach() for name, part in parts.items()}
