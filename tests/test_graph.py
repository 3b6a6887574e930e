"""The step as a CUDA graph (`train.py --graph`): what cannot be one, and that it computes the same."""
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from data.sample import ENCODED
from toyworld.rendered import render_cache
from training import RecordedStep, Stage, StageError, check_graph
from tests.stress.kill import write_base
from tests.test_train import assert_refused, metrics_of, run, small_place

RECORDABLE = ["moa", "lora", "prior", "controlnet"]
aten = torch.ops.aten
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A working directory of its own with a base model."""
    folder = tmp_path_factory.mktemp("graph")
    with small_place(folder):
        write_base(Path("base"))
        yield folder


def make(name: str, device: str, **changes) -> Stage:
    config = train.make_config("toyworld", name, **{"batch_size": 6, "samples": 24, **changes})
    scenes = render_cache("scenes", 24, workers=1)
    stage = train.STAGES[name](config, 0, torch.device(device), scenes, Path("base"), cache=ENCODED)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # nothing stays at zero, where others have no gradient
        for p in stage.module.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p.device))
    return stage


class NoWaiting(TorchDispatchMode):
    """Inside, nothing is read from the device or sent to it."""

    forbidden = {aten._local_scalar_dense.default, aten.nonzero.default, aten.lift_fresh.default,
                 aten.masked_select.default, aten.equal.default}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.forbidden, function
        return function(*args, **kwargs or {})


def one_hot(positions: torch.Tensor, count: int) -> torch.Tensor:
    """torch's own looks at the numbers, but on CUDA."""
    return (positions[..., None] == torch.arange(count)).long()


@pytest.mark.parametrize("name", RECORDABLE)
def test_the_device_never_waits_for_the_host(name, monkeypatch):
    monkeypatch.setattr(F, "one_hot", one_hot)
    stage = make(name, "cpu")
    batch = stage.batch(3)
    with NoWaiting():
        stage.loss(batch)[0].backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        batch["x"].sum().item()
    with pytest.raises(AssertionError, match="lift_fresh"), NoWaiting():
        torch.tensor([1.0])


def test_stages_say_whether_they_can_be_recorded():
    assert [name for name, stage in train.STAGES.items() if stage.recordable] == RECORDABLE


@pytest.mark.parametrize("name, config, match", [
    ("moa", {"accumulate": 2}, "accumulate 2"), ("moa", {"checkpointing": True}, "checkpointing True"),
    ("moa", {"image_layers": 1}, "image_layers 1"), ("vae", {}, "the step of this stage")])
def test_what_cannot_be_recorded_is_refused(name, config, match):
    gpu, stage = torch.device("cuda"), train.STAGES[name]
    check_graph(train.STAGES["moa"], train.make_config("toyworld", "moa"), gpu)
    with pytest.raises(StageError, match=match):
        check_graph(stage, train.make_config("toyworld", name, **config), gpu)


def test_the_presets_of_sd15_are_refused():
    for name in train.PRESETS["sd15"]:
        with pytest.raises(StageError, match="from the preset"):
            check_graph(train.STAGES[name], train.make_config("sd15", name), torch.device("cuda"))


def test_a_cpu_is_refused_before_anything_is_done(capsys, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, place / "base", "moa", "--weights", place / "base", "--graph", "--output",
                   tmp_path / "run", match="is for a CUDA GPU, this is cpu")
    assert not any(tmp_path.iterdir())  # nothing is rendered either


def compare(recorded: RecordedStep, twin: Stage, steps: list[int], tolerance: float) -> None:
    """Replays beside a twin's own steps, between which the weights change: losses, parts, gradients, and
    what the stages are watched by."""
    generator = torch.Generator().manual_seed(2)
    trained = recorded.parameters, [p for p in twin.module.parameters() if p.requires_grad]
    for step in steps:
        results = []
        for stage, parameters in zip((recorded.stage, twin), trained, strict=True):
            with stage.autocast():
                batch = stage.batch(step)
            if stage is twin:
                with stage.autocast():
                    loss, parts = stage.loss(batch)
                loss.backward()
            else:
                loss, parts = recorded(batch)
            results.append([loss.detach(), *(part.detach() for part in parts.values()),
                            *(p.grad for p in parameters)])
        health = recorded.stage.health(), twin.health()
        assert sum((value.norm() > 0).item() for value in results[1]) > len(results[1]) // 2
        for one, other in zip(*results, strict=True):
            assert (one - other).norm() <= tolerance * other.norm() + 1e-6
        assert health[0].keys() == health[1].keys()
        for key, value in health[0].items():
            assert value == pytest.approx(health[1][key], rel=tolerance, abs=1e-4), key
        with torch.no_grad():
            for one, other in zip(*trained, strict=True):
                change = 0.01 * torch.randn(one.shape, generator=generator).to(one.device)
                one.add_(change)
                other.add_(change)
                one.grad *= 7  # as clipping does, in place
                other.grad = None


@pytest.mark.parametrize("name", RECORDABLE)
def test_replays_with_a_pretended_graph(name, monkeypatch):
    """A graph that runs the step anew, into the memory of the recording, as CUDA's do."""
    recorded = RecordedStep(make(name, "cpu"))

    def replay() -> None:
        loss, parts = recorded.found
        kept = [loss, *parts.values(), *recorded.gradients]
        loss, parts = recorded.run()
        for old, new in zip(kept, [loss, *parts.values(), *(p.grad for p in recorded.parameters)],
                            strict=True):
            old.copy_(new)

    graphs = []
    for name_, value in {"Stream": MagicMock, "current_stream": MagicMock, "stream": nullcontext,
                         "graph": nullcontext,
                         "CUDAGraph": lambda: graphs.append(SimpleNamespace(replay=replay)) or graphs[-1]
                         }.items():
        monkeypatch.setattr(torch.cuda, name_, value)
    compare(recorded, make(name, "cpu"), [0, 1, 2, 1], 1e-4)
    assert len(graphs) == 1


@on_gpu
@pytest.mark.parametrize("name", RECORDABLE)
def test_a_replay_is_the_step(name):
    compare(RecordedStep(make(name, "cuda")), make(name, "cuda"), [0, 1, 2, 1], 0.02)


@on_gpu
def test_a_run_with_a_graph(place, tmp_path):
    """It logs, and goes on after a stop, as one without."""
    options = ["moa", "--weights", place / "base", "--device", "cuda", "--steps", 8, "--checkpoint-every", 4,
               "--keep", 9]
    for name, flags in {"plain": [], "graph": ["--graph"], "again": ["--graph"]}.items():
        assert run(*options, *flags, "--output", tmp_path / name) == 0
    logs = [metrics_of(tmp_path / name) for name in ("graph", "plain")]
    for one, other in zip(*logs, strict=True):
        for name in ("step", "loss", "masked", "object", "prior_weight_people", "gradient_norm_experts"):
            assert one[name] == pytest.approx(other[name], rel=0.05, abs=1e-3), (one["step"], name)
    train.list_checkpoints(tmp_path / "again")[-1].unlink()
    assert run(*options, "--graph", "--resume", "--output", tmp_path / "again") == 0
    half, whole = (torch.load(path)["parameters"] for path in train.list_checkpoints(tmp_path / "graph"))
    again = torch.load(train.list_checkpoints(tmp_path / "again")[-1])["parameters"]
    moved = sum((whole[name] - half[name]).square().sum() for name in whole)
    assert moved > 0 and sum((again[name] - whole[name]).square().sum() for name in whole) < 0.1 * moved
