"""Training MoA from folders: read while training or from a cache, in bf16, with the SD1.5 preset."""
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import toyworld
import train
from data import shards
from models import load_models
from models.load import read_tensors
from pipeline import Pipeline
from tests.test_train import (
    Killed,
    assert_close_runs,
    assert_same_run,
    closed,
    make_stage,
    metrics_of,
    options_of,
    run,
    small_place,
    torchrun,
    train_stage,
)
from training import MoAStage, StageError
from training.encode import Encoded
from weights import export_moa

ROOT = Path(__file__).parents[1]
assert closed  # a fixture of each test here, too


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A working directory of its own with a base model, a folder of 8 pictures, and runs on it,
    without sample sheets."""
    folder = tmp_path_factory.mktemp("scale")
    with small_place(folder) as patch:
        patch.setattr(MoAStage, "sheet", lambda self, path: None)
        for stage in ("vae", "clip", "prior"):
            assert run(*options_of(stage, folder), "--output", folder / stage) == 0
        toyworld.main(["--output", str(folder / "world"), "--count", "8", "--seed", "100"])
        assert run(*moa(folder), "--output", folder / "streamed") == 0
        yield folder


def moa(place: Path, *more) -> list:
    """Six steps of four samples: three epochs of the folder."""
    return [*options_of("moa", place), "--data", place / "world", *more]


def test_a_cache_gives_the_losses_of_a_run_that_reads(place, tmp_path, monkeypatch):
    """To the rounding of float16. It is filled once; then a step is the UNet alone."""
    monkeypatch.setattr(shards, "SIZE", 3)
    assert run(*moa(place, "--cache", tmp_path / "cache"), "--output", tmp_path / "run") == 0
    for a, b in zip(metrics_of(tmp_path / "run"), metrics_of(place / "streamed"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}

    files = times()
    assert len(files) == 3

    def forbidden(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr("training.encode.Encoder.__call__", forbidden)
    assert run(*moa(place, "--cache", tmp_path / "cache"), "--output", tmp_path / "again") == 0
    assert_same_run(tmp_path / "again", tmp_path / "run")
    assert files == times()
    # Other samples are kept beside it.
    with pytest.raises(AssertionError, match="encoded again"):
        run(*moa(place, "--cache", tmp_path / "cache", "--samples", 7), "--output", tmp_path / "other")


def test_two_processes_fill_a_cache_and_train_as_one_that_reads(place, tmp_path):
    """Both ways of getting data, each with one and with two processes, are the same run."""
    for name, more in (("two", []), ("cached", ["--cache", tmp_path / "cache"])):
        done = torchrun(2, *moa(place, *more), "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "two", place / "streamed", "moa")
    assert run(*moa(place, "--cache", tmp_path / "cache"), "--output", tmp_path / "one") == 0
    assert_close_runs(tmp_path / "cached", tmp_path / "one", "moa")


def test_a_run_that_reads_goes_on_where_it_was(place, tmp_path, monkeypatch):
    batch = MoAStage.batch

    def killed(self, step, turn):
        if step == 3:
            raise Killed
        return batch(self, step, turn)

    options = [*moa(place), "--checkpoint-every", 2, "--output", tmp_path / "run"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MoAStage, "batch", killed)
        run(*options)
    assert run(*options, "--resume") == 0
    assert_same_run(tmp_path / "run", place / "streamed")


def test_the_seed_draws_other_augmentations(place):
    """But not with a cache, which serves runs with any seed."""
    config = train.make_config("sd15", "moa")
    pictures, keys = [], []
    for seed in (0, 1):
        args = Namespace(weights=place / "prior", data=place / "world", stage="moa", seed=seed, cache=None)
        pictures.append(train.open_samples(args, config).read(0).references)
        args.cache = Path("cache")
        keys.append(train.open_samples(args, config).key)
    assert (pictures[0] != pictures[1]).any() and keys[0] == keys[1]


def test_every_epoch_draws_its_own_augmentations(place):
    stage = make_stage("moa", place, steps=6, augment=True, data=place / "world")
    first, second = ({sample.caption: sample for step in steps for sample in stage.read(step, 0)}
                     for steps in ((0, 1), (2, 3)))
    assert len(first) == len(second) == 8
    assert any((first[c].references != second[c].references).any() for c in first)
    again = make_stage("moa", place, steps=6, augment=True, data=place / "world").read(2, 0)
    assert all((s.references == second[s.caption].references).all() for s in again)


def test_frozen_parts_in_bf16(place, tmp_path):
    plain = make_stage("moa", place, steps=2, data=place / "world")
    stage = make_stage("moa", place, steps=2, data=place / "world", bf16=True, frozen_bf16=True)
    for module in (stage.module, stage.models.vae, stage.models.text_encoder, stage.models.image_encoder):
        for name, p in module.named_parameters():
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    with stage.autocast():
        loss = stage.loss(stage.batch(0))[0]
    assert loss.item() == pytest.approx(plain.loss(plain.batch(0))[0].item(), rel=0.03)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32
               for p in stage.module.parameters() if p.requires_grad)
    train_stage(make_stage("moa", place, steps=2, data=place / "world", bf16=True, frozen_bf16=True),
                tmp_path / "run")
    assert load_models(tmp_path / "run").image_encoder is not None


def test_the_last_layers_of_the_image_encoder_are_trained(place, tmp_path):
    stage = make_stage("moa", place, steps=2, data=place / "world", image_layers=1, frozen_bf16=True,
                       bf16=True, lr=1e-2, warmup=1)
    train_stage(stage, tmp_path / "run")
    before, after = (read_tensors(folder / "image_encoder.safetensors")
                     for folder in (place / "prior", tmp_path / "run"))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(".resblocks.0." in k for k in changed)  # the only layer there is
    assert Pipeline.load(tmp_path / "run", tmp_path / "run" / "moa.safetensors").references == "noise"
    with pytest.raises(ValueError, match="was trained together with its image encoder, which lies beside it"):
        Pipeline.load(place / "prior", tmp_path / "run" / "moa.safetensors")
    checkpoint, = (tmp_path / "run" / "checkpoints").iterdir()
    with pytest.raises(ValueError, match="trains the image encoder too"):
        export_moa.export(checkpoint, tmp_path / "other.safetensors")
    with pytest.raises(StageError, match="image_layers needs --data, and no --cache"):
        make_stage("moa", place, image_layers=1)


def test_what_is_drawn_for_each_sample(place, monkeypatch):
    """Whose reference is shown, and whether the loss counts on the people or on the whole picture."""
    stage = make_stage("moa", place, batch_size=1000, subject_probability=0.9, masked_probability=0.7,
                       null_probability=0.0, data=place / "world")
    present = torch.ones(1000, 2, dtype=torch.bool)
    present[:100, 1] = False
    masks = torch.rand(1000, 2, 16, 16) / 2
    encoded = {"latents": torch.randn(1000, 4, 16, 16), "text": torch.zeros(1000, 77, 16), "masks": masks,
               "features": torch.zeros(1000, 2, 16), "positions": torch.zeros(1000, 2), "present": present}
    monkeypatch.setattr(Encoded, "__call__", lambda self, step, turn: encoded)
    first, again, other = stage.batch(0), stage.batch(0), stage.batch(1)
    assert not first["present"][:100, 1].any() and 0.87 < first["present"][present].float().mean() < 0.93
    whole = (first["region"] == 1).all((1, 2))
    assert 0.25 < whole.float().mean() < 0.35
    assert torch.equal(first["region"][~whole], masks.sum(1)[~whole])
    for name in ("present", "region", "eps", "t"):
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]), name


@pytest.mark.parametrize("cached", [False, True])
def test_the_sd15_preset_trains(cached, place, tmp_path):
    """On models of SD1.5's structure."""
    options = ["moa", "--preset", "sd15", "--weights", place / "prior", "--data", place / "world",
               "--steps", 2, "--output", tmp_path / "run"]
    assert run(*options, *(["--cache", tmp_path / "cache"] if cached else [])) == 0
    training = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert (training["lr"], training["lambda_router"], training["max_people"]) == (5e-5, 1e-4, 4)
    assert all(line["loss"] > 0 for line in metrics_of(tmp_path / "run"))
