"""The step as a CUDA graph (`train.py --graph`): what cannot be one, and that it computes the same."""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import stages
import train
from stages import RecordedStep, StageError
from tests.stress.kill import write_base
from tests.test_train import assert_refused, metrics_of, run, shrink

RECORDABLE = ["prior", "moa", "controlnet", "lora"]
aten = torch.ops.aten
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A working directory of its own with a base model."""
    threads, folder = torch.get_num_threads(), tmp_path_factory.mktemp("graph")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shrink(patch)
        write_base(Path("base"))
        yield folder
    torch.set_num_threads(threads)


def make(name: str, device: str, **changes) -> stages.Stage:
    config = stages.make_config("toyworld", name, **{"batch_size": 6, "samples": 24, **changes})
    stage = stages.STAGES[name](config, 0, torch.device(device), Path("base"), None)
    stage.prepare()
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
    inputs = stage.inputs(3)
    with NoWaiting():
        stage.loss_of(inputs)[0].backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        inputs["x"].sum().item()
    with pytest.raises(AssertionError, match="lift_fresh"), NoWaiting():
        torch.tensor([1.0])


def test_stages_say_whether_they_can_be_recorded():
    assert [name for name, stage in stages.STAGES.items() if stage.recordable] == RECORDABLE


@pytest.mark.parametrize("stage, config, match", [
    ("moa", {"accumulate": 2}, "accumulate 2"), ("moa", {"checkpointing": True}, "checkpointing True"),
    ("moa", {"image_layers": 1}, "image_layers 1"), ("vae", {}, "the step of this stage")])
def test_what_cannot_be_recorded_is_refused(stage, config, match):
    asked = SimpleNamespace(device=torch.device("cuda"), recordable=stages.STAGES[stage].recordable,
                            config=SimpleNamespace(**{"accumulate": 1, "checkpointing": False,
                                                      "image_layers": 0, **config}))
    with pytest.raises(StageError, match=match):
        RecordedStep(asked)


def test_a_cpu_is_refused_before_anything_is_done(capsys, place, tmp_path):
    assert_refused(capsys, place / "base", "moa", "--weights", place / "base", "--graph", "--output",
                   tmp_path / "run", match="is for a CUDA GPU, this is cpu")


@on_gpu
@pytest.mark.parametrize("name", RECORDABLE)
def test_a_replay_is_the_step(name):
    """Losses, parts and gradients of several steps, and what the stage is watched by."""
    stage = make(name, "cuda")
    recorded, trained = RecordedStep(stage), [p for p in stage.module.parameters() if p.requires_grad]
    for step in (0, 1, 2, 1):
        loss, parts = recorded(step)
        found = [loss, *parts.values(), *(p.grad for p in trained)]
        found, health = [each.clone() for each in found], stage.health()
        for p in trained:
            p.grad = None
        loss, parts = stage.backward(step)
        wanted = [loss, *parts.values(), *(p.grad for p in trained)]
        assert torch.stack([g.isfinite().all() for g in found]).all()
        assert sum((g.norm() > 0).item() for g in found) > len(found) // 2
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).norm() <= 0.02 * other.norm() + 1e-6
        assert health == pytest.approx(stage.health(), rel=0.02, abs=1e-4) or name == "moa"
        with torch.no_grad():
            for p in trained:  # the next replay reads the weights as they are then
                p.add_(0.01 * torch.randn_like(p))


@on_gpu
def test_a_run_with_a_graph(place, tmp_path):
    """It logs, and goes on after a stop, as one without."""
    options = ["moa", "--weights", place / "base", "--device", "cuda"]
    assert run(*options, "--steps", 8, "--output", tmp_path / "plain") == 0
    assert run(*options, "--steps", 8, "--graph", "--output", tmp_path / "graph") == 0
    plain, graph = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "graph")
    assert [line["step"] for line in graph] == [line["step"] for line in plain]
    for one, other in zip(graph, plain, strict=True):
        for name in ("loss", "masked", "object", "prior_weight_people", "gradient_norm_experts"):
            assert one[name] == pytest.approx(other[name], rel=0.05, abs=1e-3), (one["step"], name)
    checkpoint = train.list_checkpoints(tmp_path / "graph")[-1]
    checkpoint.rename(tmp_path / "last.pt")
    assert run(*options, "--steps", 8, "--graph", "--checkpoint-every", 4, "--keep", 9, "--output",
               tmp_path / "again") == 0
    train.list_checkpoints(tmp_path / "again")[-1].unlink()
    assert run(*options, "--steps", 8, "--graph", "--resume", "--output", tmp_path / "again") == 0
    again, whole = map(torch.load, (train.list_checkpoints(tmp_path / "again")[-1], tmp_path / "last.pt"))
    for name, value in again["parameters"].items():
        assert torch.allclose(value, whole["parameters"][name], rtol=0.05, atol=1e-3), name
