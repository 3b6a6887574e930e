"""Every stage of train.py, on models and data small enough to train in a second.

`python tests/test_train.py STAGE ...` is train.py with these sizes, for the tests that need a process.
"""
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
import toyworld
from toyworld import presets
from toyworld.rendered import render_cache
from toyworld.skeleton import draw_skeletons, scene_joints
from models import load_models
from data.sample import ENCODED
from models.clip_image import CLIPImageConfig
from models.clip_text import CLIPTextConfig
from models.controlnet import ControlNetConfig
from models.load import PARTS, load_part, read_tensors
from weights.lora import LoRASetting
from models.unet import UNet, UNetConfig
from models.vae import VAEConfig
from pipeline import Pipeline
import training.moa
from training import Stage

SIZES = {"channels": (8, 8, 16, 16), "heads": 2, "context_dim": 16, "groups": 4}
SMALL = {
    "unet": UNetConfig(**SIZES),
    "controlnet": ControlNetConfig(**SIZES, hint_channels=(4, 4, 8, 8)),
    "vae": VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4),
    "text_encoder": CLIPTextConfig(dim=16, layers=1, heads=2),
    "image_encoder": CLIPImageConfig(image_size=32, patch_size=8, dim=16, layers=1, heads=2, output_dim=16),
}


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Small models, few held-out pictures, sample sheets of two steps. What runs is train.py's code."""
    generate = Pipeline.generate
    for part, sizes in SMALL.items():
        patch.setitem(presets.SMALL, part, sizes)
    for module in ("train", "toyworld.stages.vae", "toyworld.stages.clip", "toyworld.stages.classifier"):
        patch.setattr(f"{module}.render_cache", lambda kind, count, split="train": render_cache(
            kind, min(count, 24), split, workers=1))
    patch.setattr(Pipeline, "generate", lambda self, *args, **options: generate(
        self, *args, **{**options, "steps": 2}))
    torch.set_num_threads(1)


@contextmanager
def small_place(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Work in a folder with small models, until the block ends."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shrink(patch)
        try:
            yield patch
        finally:
            torch.set_num_threads(threads)


def run(*arguments) -> int:
    """train.py in this process; its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        options = ["--samples", "24", "--batch-size", "4", "--log-every", "1", "--samples-every", "0",
                   "--device", "cpu"]
        patch.setattr(sys, "argv", ["train.py", *options, *map(str, arguments)])
        try:
            train.main()
        except SystemExit as stop:
            return stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A working directory of its own, so that .cache is made there."""
    folder = tmp_path_factory.mktemp("training")
    with small_place(folder):
        yield folder


CODE = "v1-2-gabcdef-dirty"
STEPS = {"vae": 5, "clip": 2, "prior": 5, "moa": 5, "controlnet": 5, "lora": 5, "classifier": 2}
PREVIOUS = {"clip": "vae", "prior": "clip", "moa": "prior", "controlnet": "prior", "lora": "prior"}


def options_of(stage: str, runs: Path) -> list:
    weights = ["--weights", runs / PREVIOUS[stage]] if stage in PREVIOUS else []
    return [stage, "--steps", STEPS[stage], *weights]


@pytest.fixture(scope="module")
def runs(place) -> Path:
    """All stages, each on the one before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "git_describe", lambda: CODE)
        for stage in STEPS:
            assert run(*options_of(stage, place), "--samples-every", 1000, "--output", place / stage) == 0
    return place


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint_of(folder: Path) -> dict:
    return torch.load(train.list_checkpoints(folder)[-1], weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise equal weights, averages and optimizer; equal logs but for the speed."""
    a, b = checkpoint_of(one), checkpoint_of(other)
    assert a["step"] == b["step"]
    for name in ("parameters", "average"):
        assert list(a[name]) == list(b[name])
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name]), name
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(x[k], y[k]) for k in x)
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    logs = [[{k: v for k, v in line.items() if k not in ("images_per_second", "memory_gb")}
             for line in metrics_of(folder)] for folder in (one, other)]
    assert logs[0] == logs[1]


def assert_refused(capsys, folder: Path, *arguments, match: str) -> None:
    """Exit status 2, one line on stderr, not a byte of `folder` changed, and no folder more or less."""
    output = Path(arguments[arguments.index("--output") + 1])
    before, there = snapshot(folder), tree(output.parent)
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line.strip() for line in lines if line.strip() and "%|" not in line]  # no progress bars
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert match in lines[0]
    assert snapshot(folder) == before and tree(output.parent) == there


def tree(folder: Path) -> set[Path]:
    """All files and folders in it but those of rendered data."""
    return {path for path in folder.rglob("*") if ".cache" not in path.parts}


# What a run writes -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STEPS)
def test_a_run_leaves_a_complete_folder(stage, runs):
    folder = runs / stage
    recorded = json.loads((folder / "config.json").read_text())["training"]
    assert recorded["stage"] == stage
    assert recorded["steps"] == STEPS[stage]
    assert recorded["code"] == CODE
    logged = metrics_of(folder)
    assert [line["step"] for line in logged] == list(range(1, STEPS[stage] + 1))
    assert all(line["loss"] > 0 for line in logged)
    assert checkpoint_of(folder)["step"] == STEPS[stage]
    assert any(path.stat().st_size > 40 for path in (folder / "samples").iterdir())
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "samples"} < names
    assert not [name for name in names if name.startswith(".")]


def test_a_run_that_goes_on_with_other_code_names_both(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "moa", tmp_path / "moa")
    for code in ("later", "later", CODE):
        monkeypatch.setattr(train, "git_describe", lambda code=code: code)
        assert run(*options_of("moa", runs), "--output", tmp_path / "moa", "--resume") == 0
    config = json.loads((tmp_path / "moa" / "config.json").read_text())
    assert config["training"]["code"] == f"{CODE}, then later"


def test_each_folder_is_the_next_stage_s_weights(runs):
    held = {stage: {path.stem for path in (runs / stage).glob("*.safetensors")} for stage in STEPS}
    assert held["vae"] == {"vae"}
    assert held["clip"] == {"vae", "text_encoder", "image_encoder"}
    assert held["prior"] == set(PARTS)
    assert held["moa"] == set(PARTS) | {"moa"}  # no subjects: of so few it could refuse everybody
    assert held["controlnet"] == set(PARTS) | {"controlnet"}
    assert held["classifier"] == {"classifier"}
    assert held["lora"] == {"lora"}
    for stage, before in PREVIOUS.items():
        for part in held[before] if stage != "lora" else ():
            name = f"{part}.safetensors"
            assert (runs / stage / name).read_bytes() == (runs / before / name).read_bytes()
    for stage in ("vae", "clip", "prior", "moa", "controlnet"):
        for part in held[stage] & set(PARTS):
            assert load_part(runs / stage, part).cfg == load_part(runs / "moa", part).cfg
    assert load_models(runs / "prior").image_encoder is not None
    assert Pipeline.load(runs / "moa", runs / "moa" / "moa.safetensors").prompt is not None


def test_moa_logs_all_parts_of_its_loss(runs):
    config, logged = train.PRESETS["toyworld"]["moa"], metrics_of(runs / "moa")
    for line in logged:
        assert {"masked", "router", "object", "prior_weight_people", "prior_weight_background"} <= set(line)
        total = line["masked"] + config.lambda_router * line["router"] + config.lambda_object * line["object"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    first = metrics_of(runs / "moa")[0]
    assert first["prior_weight_people"] == pytest.approx(0.5)  # the routers start at zero
    assert first["prior_weight_background"] == pytest.approx(0.5)


def test_moa_goes_on_from_a_moa_file(runs, tmp_path, capsys, monkeypatch):
    """Below, the routers start where the file's ended; --moa is refused where it means nothing. Of enough
    subjects it says where they lie."""
    monkeypatch.setattr(training.moa, "ENOUGH", 0)
    options = ["moa", "--steps", 1, "--weights", runs / "prior", "--moa"]
    assert run(*options, runs / "moa" / "moa.safetensors", "--output", tmp_path / "run") == 0
    first = metrics_of(tmp_path / "run")[0]
    assert first["prior_weight_people"] != pytest.approx(0.5, abs=1e-6)
    assert (tmp_path / "run" / "subjects.safetensors").exists()
    assert_refused(capsys, runs, *options, runs / "vae" / "vae.safetensors", "--output", tmp_path / "no",
                   match="is not a MoA file")
    assert_refused(capsys, runs, *options, tmp_path / "nowhere", "--output", tmp_path / "no2",
                   match="nowhere")
    assert_refused(capsys, runs, "vae", "--moa", "x", "--output", tmp_path / "no3", match="cannot use --moa")


# Training itself ---------------------------------------------------------------------------------


MADE: list[Stage] = []


@pytest.fixture(autouse=True)
def closed():
    """The readers of stages that a test made end with it: collected as garbage they take 5 seconds each."""
    yield
    while MADE:
        MADE.pop().stream.close()


def make_stage(name: str, runs: Path, data: Path | None = None, **changes) -> Stage:
    config = train.make_config("toyworld", name, **{"batch_size": 4, "samples": 24, **changes})
    args = Namespace(weights=None, data=data, stage=name, seed=0, cache=None)
    weights = runs / PREVIOUS[name] if name in PREVIOUS else None
    MADE.append(train.STAGES[name](config, 0, torch.device("cpu"), train.open_samples(args, config), weights,
                                   None, None if data else ENCODED))
    return MADE[-1]


def train_stage(stage: Stage, output: Path) -> None:
    args = Namespace(stage="test", preset="toyworld", seed=0, output=output, resume=False, log_every=50,
                     checkpoint_every=1000, samples_every=1000, keep=1, weights=None, data=None, moa=None,
                     graph=False)
    train.train(stage, args)


def test_moa_trains_its_own_parameters_and_no_others(runs, tmp_path):
    stage = make_stage("moa", runs, steps=4)
    frozen_models = (stage.models.vae, stage.models.text_encoder, stage.models.image_encoder)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (stage.module, *frozen_models)]
    base = set(read_tensors(runs / "prior" / "unet.safetensors"))
    trained = {name for name, p in stage.module.named_parameters() if p.requires_grad}
    train_stage(stage, tmp_path / "run")
    after = [m.state_dict() for m in (stage.module, *frozen_models)]
    for was, now in zip(before[1:], after[1:], strict=True):
        assert all(torch.equal(was[k], now[k]) for k in was)
    changed = {k for k in before[0] if not torch.equal(before[0][k], after[0][k])}
    assert changed <= trained
    assert all(".personalized." in k or ".router." in k or k.startswith("prompt.") for k in trained)
    frozen = {k for k in before[0] if k.startswith("unet.")} - trained
    assert len(frozen) == len(base)
    for kind in (".personalized.", ".router.", "prompt."):
        of_kind = {k for k in trained if kind in k}
        assert len(changed & of_kind) > 0.9 * len(of_kind), kind


def test_a_controlnet_trains_alone_and_learns_at_every_layer(runs, tmp_path):
    """Its zero convolutions move first, what lies behind them next; the base stays what it was."""
    stage = make_stage("controlnet", runs, steps=4, warmup=1, ema=0.0)
    frozen = [stage.unet, stage.models.vae, stage.models.text_encoder]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (stage.module, *frozen)]
    with torch.no_grad():
        base = UNet(SMALL["unet"]).requires_grad_(False)
        base.load_state_dict(read_tensors(runs / "prior" / "unet.safetensors"))
        batch = stage.batch(0)
        plain = (base(batch["x"], batch["t"], batch["text"]) - batch["eps"]).square().mean()
        assert stage.loss(batch)[1]["eps"].item() == pytest.approx(plain.item(), rel=1e-5)  # at the start
    train_stage(stage, tmp_path / "run")
    after = [m.state_dict() for m in (stage.module, *frozen)]
    for was, now in zip(before[1:], after[1:], strict=True):
        assert all(torch.equal(was[k], now[k]) for k in was)
    still = {k for k in before[0] if torch.equal(before[0][k], after[0][k])}
    assert not still
    net = load_part(tmp_path / "run", "controlnet")
    assert net.cfg == SMALL["controlnet"]
    assert all(torch.allclose(v, after[0][k], atol=1e-3) for k, v in net.state_dict().items())


def test_a_controlnet_is_given_the_skeleton_of_its_scene(runs, monkeypatch):
    stage, seen = make_stage("controlnet", runs), []
    stage.module.register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    stage.loss(stage.batch(3))
    for (index, _), hint in zip(stage.order(3, 0), seen[0], strict=True):
        joints = scene_joints(toyworld.sample_scene(int(index), "train"))
        assert torch.equal((hint * 255).round().byte().permute(1, 2, 0), torch.tensor(draw_skeletons(joints)))
        caption = toyworld.sample_scene(int(index), "train").caption
        assert stage.samples.captions[index] == caption


def test_a_lora_is_read_by_the_pipeline_and_does_what_it_was_trained_to(runs, tmp_path):
    """The file that training wrote, merged: the output that the frozen UNet had with it beside."""
    stage = make_stage("lora", runs, steps=4, ema=0.0, lr=0.05, warmup=1, lora_layers=("attentions",))
    frozen = {k: v.clone() for k, v in stage.unet.state_dict().items()}
    train_stage(stage, tmp_path / "run")
    assert all(torch.equal(v, frozen[k]) for k, v in stage.unet.state_dict().items())
    file = tmp_path / "run" / "lora.safetensors"
    state = read_tensors(file)
    assert all(re.fullmatch(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", k) for k in state)
    assert all(state[k].abs().sum() > 0 for k in state)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([5, 700]), torch.randn(2, 77, 16)
    pipeline = Pipeline.load(runs / "prior")
    with torch.no_grad():
        before, beside = pipeline.models.unet(*inputs), stage.unet(*inputs)
        pipeline.set_loras([LoRASetting(file)], "all")
        merged = pipeline.models.unet(*inputs)
    change = (before - beside).abs().max()
    assert change > 1e-4
    assert (merged - beside).abs().max() < 0.01 * change  # the file is in half precision


@pytest.mark.parametrize(("name", "factor"), [("vae", 0.8), ("prior", 0.97), ("moa", 0.9)])
def test_the_loss_goes_down_on_a_few_pictures(name, factor, runs, tmp_path):
    """For moa by its router loss: on this poor base the experts have little to win in so few steps."""
    stage = make_stage(name, runs, steps=20, samples=4, lr=3e-3, warmup=1, ema=0.0,
                       lambda_router=0.01)

    @torch.no_grad()
    def loss() -> float:
        return sum(stage.loss(stage.batch(step))[0].item() for step in range(100, 110))

    before = loss()
    train_stage(stage, tmp_path / "run")
    assert loss() < factor * before


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = Namespace(steps=100, warmup=10, decay=0.5)
    rates = [train.learning_rate_factor(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.02)
    assert train.learning_rate_factor(99, Namespace(steps=100, warmup=0, decay=0.0)) == 1.0


@pytest.mark.parametrize(("bad", "status"), [([3], 0), (range(3, 20), 2)])
def test_steps_whose_gradient_is_not_finite(bad, status, runs, tmp_path, monkeypatch, capsys):
    """One is left out and counted; too many in a row end the run, its last checkpoint named."""
    batch = train.STAGES["vae"].batch

    def overflow(self, step, turn):
        found = batch(self, step, turn)
        return {**found, "noise": found["noise"] * (float("nan") if step in bad else 1)}

    monkeypatch.setattr(train.STAGES["vae"], "batch", overflow)
    assert run("vae", "--steps", 20, "--checkpoint-every", 2, "--output", tmp_path / "run") == status
    assert all(p.isfinite().all() for p in checkpoint_of(tmp_path / "run")["parameters"].values())
    logged = metrics_of(tmp_path / "run")
    if status == 0:
        assert [line["skipped"] for line in logged] == [0] * 3 + [1] * 17
    else:
        assert len(logged) == 3 + train.PATIENCE
        last = capsys.readouterr().err.splitlines()[-1]
        assert "error: the gradient was not finite in 11 steps in a row, up to step 13" in last
        assert "go on from the newest checkpoint" in last


@pytest.mark.parametrize("stage", ["vae", "moa"])
def test_accumulation_is_the_same_run(stage, runs, tmp_path):
    assert run(*options_of(stage, runs), "--accumulate", 2, "--output", tmp_path / "run") == 0
    assert_close_runs(tmp_path / "run", runs / stage, stage)


@pytest.mark.parametrize("name", ["moa", "lora"])
def test_checkpointing_changes_no_gradient(name, runs):
    """Those of the routers, of the attention to the subjects and of LoRAs come through hooks."""
    gradients = []
    for checkpointing in (False, True):
        stage = make_stage(name, runs, steps=1, checkpointing=checkpointing, lambda_router=0.1,
                           lambda_object=0.1, router_layers=tuple(range(16)))
        stage.loss(stage.batch(0))[0].backward()
        gradients.append({k: p.grad for k, p in stage.module.named_parameters() if p.requires_grad})
    assert all(gradients[0][k].abs().sum() > 0 for k in gradients[0] if ".router." in k)
    assert sum(gradient.abs().sum() for gradient in gradients[0].values()) > 0
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], atol=1e-7, rtol=1e-5), key


# Stopped and resumed -----------------------------------------------------------------------------


class Killed(BaseException):
    """What SIGKILL would be."""


@pytest.mark.parametrize(("stage", "stop"), [("vae", "killed"), ("moa", "killed"), ("moa", "interrupted")])
def test_a_stopped_run_goes_on_to_the_same_weights(stage, stop, runs, tmp_path, monkeypatch, capsys):
    options = [*options_of(stage, runs), "--checkpoint-every", 2, "--output", tmp_path / "run"]
    cls, batch = train.STAGES[stage], train.STAGES[stage].batch

    def interrupted(self, step, turn):
        if step == 3 and stop == "killed":
            raise Killed
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return batch(self, step, turn)

    monkeypatch.setattr(cls, "batch", interrupted)
    if stop == "killed":
        with pytest.raises(Killed):
            run(*options)
        assert checkpoint_of(tmp_path / "run")["step"] == 2
        with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
            log.write('{"step": 4, "lo')  # a line that was being written
    else:
        assert run(*options) == 130
        assert "stopped: step 4 is saved" in capsys.readouterr().err.splitlines()[-1]
        assert checkpoint_of(tmp_path / "run")["step"] == 4
    assert not list((tmp_path / "run").glob("*.safetensors"))
    monkeypatch.setattr(cls, "batch", batch)
    assert run(*options, "--resume") == 0
    assert_same_run(tmp_path / "run", runs / stage)


def test_sigterm_from_outside(runs, tmp_path):
    """Wherever the signal arrives, the run goes on to the same weights."""
    options = ["vae", "--steps", "30", "--samples", "24", "--batch-size", "4", "--log-every", "1",
               "--device", "cpu", "--output"]
    command = [sys.executable, __file__, *options, tmp_path / "stopped"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    log, end = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 200
    while process.poll() is None and time.monotonic() < end:
        if log.exists() and log.read_bytes().count(b"\n") >= 3:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    _, text = process.communicate(timeout=100)
    assert process.returncode == 0, text
    assert text.splitlines()[-1].startswith("stopped: step ")
    assert 3 <= checkpoint_of(tmp_path / "stopped")["step"] < 30
    assert run(*options, tmp_path / "stopped", "--resume") == 0
    assert run(*options, tmp_path / "whole") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_another_run_s_checkpoint_is_refused(runs, capsys, monkeypatch):
    options = ["--resume", "--output", runs / "vae"]
    assert_refused(capsys, runs / "vae", *options_of("vae", runs), *options, "--seed", 1, "--batch-size", 5,
                   match="seed 0, not 1, batch_size 4, not 5")
    # The presets are there to be edited, but a run goes on with the one that it began with.
    edited = replace(train.PRESETS["toyworld"]["vae"], lr=2e-3)
    monkeypatch.setitem(train.PRESETS["toyworld"], "vae", edited)
    assert_refused(capsys, runs / "vae", *options_of("vae", runs), *options, match="lr 0.001, not 0.002")


def test_other_weights_below_a_resumed_run_are_refused(runs, tmp_path, capsys):
    shutil.copytree(runs / "prior", tmp_path / "prior")
    path = tmp_path / "prior" / "unet.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    options = ["moa", "--steps", STEPS["moa"], "--output", runs / "moa", "--resume", "--weights"]
    assert_refused(capsys, runs, *options, tmp_path / "prior", match="is of another run: weights")


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("content", ["half", "empty", "pickle", "torch pickle", "other keys"])
def test_a_broken_checkpoint_is_refused(content, runs, tmp_path, capsys):
    shutil.copytree(runs / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "checkpoints" / "000005.pt"
    if content == "half":
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"run": Bomb()} if content == "torch pickle" else {"step": 3}, path)
    assert_refused(capsys, tmp_path, *options_of("vae", runs), "--output", tmp_path / "vae", "--resume",
                   match="000005.pt is not a checkpoint that can be read")
    assert not Path("exploded").exists()


def test_folders_that_hold_something_are_left_alone(runs, tmp_path, capsys):
    vae = options_of("vae", runs)
    assert_refused(capsys, runs, *vae, "--output", runs / "vae", match="holds a run already")
    shutil.copytree(runs / "prior", tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / "checkpoints")
    assert_refused(capsys, tmp_path, *vae, "--output", tmp_path / "weights", match="holds weights already")
    (tmp_path / "file").write_text("mine")
    assert_refused(capsys, tmp_path, *vae, "--output", tmp_path / "file", match="file is a file: give")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").write_bytes(b"")
    assert_refused(capsys, tmp_path, *vae, "--output", tmp_path / "mine",
                   match="mine holds files that are of no run")


def test_a_run_that_has_begun_is_left_alone(runs, tmp_path, monkeypatch, capsys):
    """Before its first checkpoint, and where it began after another was checked. Its data stay its data."""
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(runs / "vae" / name, tmp_path)
    vae = options_of("vae", runs)
    assert_refused(capsys, tmp_path, *vae, "--output", tmp_path, match="holds a run already")
    monkeypatch.setattr(train, "check", lambda args: None)
    assert run(*vae, "--output", tmp_path) == 2 and "that began meanwhile" in capsys.readouterr().err
    monkeypatch.undo()
    assert_refused(capsys, runs, *options_of("prior", runs), "--output", runs / "prior", "--resume", "--data",
                   tmp_path, match="was trained on rendered scenes: resume it with no --data")


# Several processes -------------------------------------------------------------------------------


def torchrun(processes: int, *arguments, batch_size: int = 4) -> subprocess.CompletedProcess:
    """train.py under torchrun; one thread per process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes,
               __file__, *arguments, "--samples", 24, "--batch-size", batch_size, "--log-every", 1,
               "--device", "cpu"]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)


def assert_close_runs(one: Path, other: Path, stage: str) -> None:
    """Logged losses equal to 1e-5 (bf16: to its rounding), weights to what Adam makes of that."""
    bf16 = train.PRESETS["toyworld"][stage].bf16
    for a, b in zip(metrics_of(one), metrics_of(other), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3 if bf16 else 1e-5)
    a, b = (checkpoint_of(folder)["average"] for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=5e-3 if bf16 else 2e-4) for k in a)


@pytest.mark.parametrize("stage", ["vae", "moa"])
def test_two_processes_are_the_same_run_as_one(stage, runs, tmp_path):
    done = torchrun(2, *options_of(stage, runs), "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "run", runs / stage, stage)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["processes"] == 2
    for a, b in zip(metrics_of(tmp_path / "run"), metrics_of(runs / stage), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.endswith("_by_layer"):
                assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_a_stopped_run_goes_on_with_another_number_of_processes(runs, tmp_path, monkeypatch):
    options = [*options_of("moa", runs), "--output", tmp_path / "run"]
    batch = train.STAGES["moa"].batch

    def interrupted(self, step, turn):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, step, turn)

    with monkeypatch.context() as patch:
        patch.setattr(train.STAGES["moa"], "batch", interrupted)
        assert run(*options) == 0
    assert checkpoint_of(tmp_path / "run")["step"] == 3
    done = torchrun(2, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "run", runs / "moa", "moa")


def test_what_cannot_be_shared_between_processes(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.stage.world_size", lambda: 2)
    for stage, batch_size, match in (("clip", 4, "run it in one process"),
                                     ("vae", 3, "--batch-size 3 must be a multiple of 2")):
        assert_refused(capsys, runs / "vae", *options_of(stage, runs), "--batch-size", batch_size,
                       "--output", tmp_path / "run", match=match)


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "match"), [
    (["moa"], "moa needs --weights"), (["lora", "--moa", "x"], "cannot use --moa"),
    (["prior", "--weights", "nowhere"], "nowhere"), (["moa", "--weights", "vae"], "unet"),
    (["vae", "--preset", "sd15"], "preset sd15 has no stage vae"),
    (["moa", "--weights", "prior", "--cache", "x"], "--cache goes with --data"),
    (["vae", "--device", "tpu0"], "tpu0"), (["vae", "--data", "nowhere"], "image_ids_train.txt")])
def test_bad_options_are_one_line(arguments, match, runs, tmp_path, capsys):
    assert_refused(capsys, runs, *arguments, "--steps", 1, "--output", tmp_path / "run", match=match)


def test_worlds_are_not_mixed(runs, tmp_path, capsys):
    """SD1.5's weights with the small world's recipe, or on its scenes."""
    big = tmp_path / "sd15"
    big.mkdir()
    (big / "config.json").write_text(json.dumps({"unet": asdict(UNetConfig())}))
    for stage in ("moa", "lora"):
        assert_refused(capsys, big, stage, "--weights", big, "--output", tmp_path / "run",
                       match="is of Stable Diffusion 1.5's size: give --preset sd15")
    shutil.copytree(runs / "prior", tmp_path / "prior")
    config = json.loads((tmp_path / "prior" / "config.json").read_text())
    (tmp_path / "prior" / "config.json").write_text(json.dumps({**config, "image_size": 256}))
    for stage in ("moa", "lora"):
        assert_refused(capsys, runs, stage, "--preset", "sd15", "--weights", tmp_path / "prior",
                       "--batch-size", 4, "--output", tmp_path / "run",
                       match="draws 256 pixels, the small world's scenes have 128: give --data")


@pytest.fixture(scope="module")
def folder(place) -> Path:
    """Eight pictures in FastComposer's layout."""
    toyworld.main(["--output", str(place / "world"), "--count", "8", "--seed", "100"])
    return place / "world"


def test_a_folder_may_be_moved(folder, runs, tmp_path):
    """Its samples are read in place of rendered ones, and a copy goes on to the same weights."""
    shutil.copytree(folder, tmp_path / "moved")
    options = [*options_of("moa", runs), "--steps", 3, "--checkpoint-every", 2, "--keep", 9, "--data"]
    assert run(*options, folder, "--output", tmp_path / "whole") == 0
    recorded = json.loads((tmp_path / "whole" / "config.json").read_text())["training"]
    assert recorded["data"] == folder.name and recorded["samples"] == 24
    assert metrics_of(tmp_path / "whole")[1]["loss"] != metrics_of(runs / "moa")[1]["loss"]
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    train.list_checkpoints(tmp_path / "run")[-1].unlink()
    assert run(*options, tmp_path / "moved", "--output", tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_sd15_preset_trains_a_style(folder, runs, tmp_path):
    options = ["--preset", "sd15", "--steps", 1, "--data", folder, "--weights", runs / "prior"]
    assert run("lora", *options, "--output", tmp_path / "run") == 0
    state = read_tensors(tmp_path / "run" / "lora.safetensors")
    assert len(state) == 32 * 4 * 3  # the queries, keys, values and outputs of all attention layers
    assert {len(v) for k, v in state.items() if "lora_down" in k} == {4}


def test_folders_that_cannot_be_trained_on(folder, runs, tmp_path, capsys):
    world = tmp_path / "world"
    shutil.copytree(folder, world)
    options = ["--steps", 1, "--output", tmp_path / "run", "--data", world]
    assert_refused(capsys, world, "classifier", *options, match="cannot use --data")
    assert_refused(capsys, world, "clip", *options, match="cannot use --data")
    for path in world.rglob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "segments": []}))
    assert_refused(capsys, world, "moa", "--weights", runs / "prior", *options, "--samples", 7,
                   match="has no subjects")
    assert run("lora", "--weights", runs / "prior", *options) == 0  # pictures and captions are enough
    shutil.rmtree(tmp_path / "run")
    assert run("vae", *options) == 0  # pictures are enough for it
    shutil.rmtree(tmp_path / "run")
    for path in world.rglob("*.npy"):
        path.unlink()
    assert_refused(capsys, world, "vae", *options, match="none of the 8 samples can be used")
    (world / "image_ids_train.txt").write_text("")
    assert_refused(capsys, world, "vae", *options, match="no image id")


def test_a_noun_that_does_not_fit_into_the_prompt_is_not_a_subject(runs):
    stage = make_stage("moa", runs, steps=1)
    captions = ["a man running", "a " + "man " * 73 + "woman", "a " + "man " * 74 + "woman"]
    ends = [5, len(captions[1]), len(captions[2])]
    sample = stage.samples.read(0)
    samples = [replace(sample, caption=c, ends=[end]) for c, end in zip(captions, ends, strict=True)]
    batch = stage.encode(samples)
    assert batch["positions"][:, 0].tolist() == [2, 75, 0]
    assert batch["present"].tolist() == [[True, False], [True, False], [False, False]]


def test_a_noun_without_embedding_is_not_a_subject(runs):
    stage = make_stage("moa", runs, steps=1)
    sample = stage.samples.read(0)
    captions = ["a woman running", "an astronaut running"]
    samples = [replace(sample, caption=c, ends=[c.index(" run")]) for c in captions]
    assert stage.encode(samples)["present"].tolist() == [[True, False], [False, False]]


if __name__ == "__main__":
    shrink(pytest.MonkeyPatch())
    train.main()
