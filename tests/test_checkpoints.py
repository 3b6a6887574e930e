"""Checkpoints: their names, how many stay, what goes on from them, and the MoA files made of them."""
import pickle
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import moa.mixture
import train
from moa import load_moa
from moa import read_moa
from models import load_models
from tests.stress.kill import write_base
from tests.test_train import (Bomb, assert_refused, assert_same_run, checkpoint_of, run, small_place,
                              snapshot)
from training import MoAStage
from weights import export_moa

MOA = ["moa", "--steps", 6, "--checkpoint-every", 2]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A working directory of its own with a base model; sample sheets are left out."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with small_place(folder) as patch:
        patch.setattr(MoAStage, "sheet", lambda self, path: None)
        write_base(Path("base"))
        yield folder


def train_moa(output: Path, *options) -> int:
    return run(*MOA, "--weights", "base", "--output", output, *options)


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """An undisturbed run that keeps all of its checkpoints."""
    assert train_moa(place / "whole", "--keep", 9) == 0
    return place / "whole"


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


# Which files there are ---------------------------------------------------------------------------


def test_checkpoints_are_named_by_step_and_hold_what_is_trained_by_name(whole):
    assert names(whole) == ["000002.pt", "000004.pt", "000006.pt"]
    assert [path.name for path in train.list_checkpoints(whole)] == names(whole)
    state = checkpoint_of(whole)
    assert state["step"] == 6
    unet = load_models(whole).unet
    prompt = load_moa(unet, whole / "moa.safetensors")
    expected = {f"unet.{k}": v for k, v in unet.named_parameters() if v.requires_grad}
    expected |= {f"prompt.{k}": v for k, v in prompt.named_parameters()}
    for part in ("parameters", "average"):
        assert {k: v.shape for k, v in state[part].items()} == {k: v.shape for k, v in expected.items()}
    assert all(".personalized." in k or ".router." in k or k.startswith("prompt.") for k in expected)


@pytest.mark.parametrize(("options", "kept"), [
    ([], ["000006.pt"]), (["--keep", 2], ["000004.pt", "000006.pt"])])
def test_the_newest_stay(options, kept, whole, tmp_path):
    assert train_moa(tmp_path / "run", *options) == 0
    assert names(tmp_path / "run") == kept
    assert_same_run(tmp_path / "run", whole)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(whole, tmp_path, monkeypatch, capsys):
    save = torch.save

    def full(state, path):
        if state["step"] == 4:
            Path(path).write_bytes(b"half")
            raise OSError("no space left")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert train_moa(tmp_path / "run") == 2
    assert "no space left" in capsys.readouterr().err.splitlines()[-1]
    assert names(tmp_path / "run") == ["000002.pt"]
    assert train_moa(tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", whole)


def test_what_a_killed_process_was_writing_is_removed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    half = tmp_path / "run" / "checkpoints" / ".000008.pt.123.tmp"
    half.write_bytes(b"half")
    (tmp_path / "run" / "checkpoints" / "notes.pt").write_bytes(b"of somebody")
    assert train_moa(tmp_path / "run", "--resume") == 0
    assert names(tmp_path / "run") == [*names(whole), "notes.pt"]


def test_resuming_takes_the_newest_and_no_other(whole, tmp_path, capsys):
    """One that is broken is named; without it the older one goes on to the same weights."""
    output = tmp_path / "run"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("*.safetensors"))
    newest = output / "checkpoints" / "000006.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert_refused(capsys, output, *MOA, "--weights", "base", "--output", output, "--resume",
                   match="000006.pt is not a checkpoint that can be read")
    newest.unlink()
    assert train_moa(output, "--resume") == 0
    assert_same_run(output, whole)


def test_resume_starts_where_there_is_no_checkpoint(whole, tmp_path):
    """So that `torchrun --max-restarts` needs nothing else."""
    assert train_moa(tmp_path / "run", "--resume", "--keep", 9) == 0
    assert_same_run(tmp_path / "run", whole)


def test_sigterm_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MoAStage, "setup", lambda self: signal.raise_signal(signal.SIGTERM))
    assert train_moa(tmp_path / "run") == 143
    assert capsys.readouterr().err == "stopped: before the first step\n"
    assert not (tmp_path / "run").exists()


# weights/export_moa.py ---------------------------------------------------------------------------


def export(*arguments) -> int:
    try:
        export_moa.main(list(map(str, arguments)))
    except SystemExit as stop:
        return stop.code
    return 0


def assert_same_file(one: Path, other: Path) -> None:
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert read_moa(one)[0] == read_moa(other)[0]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_exported_checkpoint_is_what_the_run_writes(ema, tmp_path, monkeypatch):
    """With and without a moving average, by tensor, type and metadata."""
    preset = train.PRESETS["toyworld"]
    monkeypatch.setitem(preset, "moa", replace(preset["moa"], ema=ema))
    output = tmp_path / "run"
    assert train_moa(output) == 0
    assert export(output / "checkpoints" / "000006.pt", "--output", tmp_path / "new" / "a.safetensors") == 0
    assert_same_file(tmp_path / "new" / "a.safetensors", output / "moa.safetensors")
    state = checkpoint_of(output)
    assert all(torch.equal(v, state["parameters"][k]) for k, v in state["average"].items()) == (ema == 0)


class CountingRouter(moa.mixture.Router):
    """Knows how often it was asked in training."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        self.asked = self.asked + self.training
        return super().forward(z)


def asked_of(file: Path) -> set[float]:
    return {value.item() for name, value in load_file(file).items() if name.endswith("router.asked")}


def test_a_router_s_buffers_are_kept(tmp_path, monkeypatch):
    """By a checkpoint that is gone on with, and by a file that is made of one."""
    monkeypatch.setattr(moa.mixture, "Router", CountingRouter)
    assert train_moa(tmp_path / "run", "--steps", 3, "--keep", 9) == 0
    export_moa.export(tmp_path / "run" / "checkpoints" / "000002.pt", tmp_path / "two.safetensors")
    assert asked_of(tmp_path / "two.safetensors") == {2}
    (tmp_path / "run" / "checkpoints" / "000003.pt").unlink()
    assert train_moa(tmp_path / "run", "--steps", 3, "--resume") == 0
    assert asked_of(tmp_path / "run" / "moa.safetensors") == {3}


def test_a_file_of_any_step_can_be_loaded(whole, tmp_path, capsys):
    assert export(whole / "checkpoints" / "000004.pt", "--output", tmp_path / "a.safetensors") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.safetensors'}: step 4 of 6\n"
    unet = load_models(whole).unet
    load_moa(unet, tmp_path / "a.safetensors")
    average = torch.load(whole / "checkpoints" / "000004.pt", weights_only=True)["average"]
    found = dict(unet.named_parameters())
    for name, value in average.items():
        if name.startswith("unet."):
            assert torch.equal(found[name.removeprefix("unet.")], value.half().float())


@pytest.mark.parametrize("older", [True, False])
def test_a_broken_newest_checkpoint_is_told_a_cure(whole, older, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    if older:
        shutil.copy(whole / "checkpoints" / "000004.pt", tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints" / "000006.pt").write_bytes(b"")
    assert run("moa", "--weights", whole, "--steps", 8, "--output", tmp_path / "run", "--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert ("remove it, and --resume goes on from" in error and "000004.pt" in error) if older else (
        "start the run anew" in error)


@pytest.mark.parametrize(("content", "match"), [
    ("half", "is not a checkpoint that can be read: "), ("empty", "it is damaged"),
    ("pickle", "or a pickle that could run code"), ("torch pickle", "or a pickle that could run code"),
    ("other keys", "no run, no parameters, no average, no optimizer in it"), ("none", "is not a file: give"),
    ("a MoA file", "is not a checkpoint"), ("other stage", "is of the stage vae: only moa has a MoA file")])
def test_what_cannot_be_exported(content, match, whole, tmp_path, capsys):
    path = tmp_path / "broken.pt"
    good = whole / "checkpoints" / "000006.pt"
    if content in ("half", "empty"):
        path.write_bytes(good.read_bytes()[:good.stat().st_size // 2 if content == "half" else 0])
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif content == "torch pickle":
        torch.save({"run": Bomb()}, path)
    elif content == "other keys":
        torch.save({"step": 3}, path)
    elif content == "a MoA file":
        shutil.copy(whole / "moa.safetensors", path)
    elif content == "other stage":
        assert run("vae", "--steps", 1, "--output", tmp_path / "vae") == 0
        path = tmp_path / "vae" / "checkpoints" / "000001.pt"
    capsys.readouterr()
    before = snapshot(tmp_path)
    assert export(path, "--output", tmp_path / "out.safetensors") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert match in lines[0]
    assert snapshot(tmp_path) == before
    assert not Path("exploded").exists()


def test_outputs_that_are_left_alone(whole, tmp_path, capsys):
    checkpoint = tmp_path / "a.pt"
    shutil.copy(whole / "checkpoints" / "000006.pt", checkpoint)
    before = snapshot(tmp_path)
    for output, match in ((checkpoint, "is the checkpoint itself"), (tmp_path, "exists already"),
                          (checkpoint / "b", "exists")):
        assert export(checkpoint, "--output", output) == 2
        assert match in capsys.readouterr().err
    assert snapshot(tmp_path) == before
