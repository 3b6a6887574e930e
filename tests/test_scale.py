"""Training MoA from folders: read while training or from a cache, in bf16, with the SD1.5 preset."""
import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

import training
from data import shards
import toyworld
from data.fastcomposer import Folder
from models import load_models
from models.load import read_tensors
from pipeline import Pipeline
from tests.test_train import (
    assert_close_runs,
    assert_refused,
    assert_same_run,
    make_stage,
    metrics_of,
    options_of,
    run,
    small_place,
    torchrun,
    train_stage,
)
from weights import export_moa

ROOT = Path(__file__).parents[1]

@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A working directory of its own with a base model, a folder of 8 pictures, and runs on it."""
    folder = tmp_path_factory.mktemp("scale")
    with small_place(folder):
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
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 4  # 3 shards and the description

    def forbidden(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr("training.encode.Encoder.__call__", forbidden)
    assert run(*moa(place, "--cache", tmp_path / "cache"), "--output", tmp_path / "again") == 0
    assert_same_run(tmp_path / "again", tmp_path / "run")
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


def test_two_processes_fill_a_cache_and_train_as_one_that_reads(place, tmp_path):
    """Both ways of getting data, each with one and with two processes, are the same run."""
    for name, more in (("two", []), ("cached", ["--cache", tmp_path / "cache"])):
        done = torchrun(2, *moa(place, *more), "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "two", place / "streamed", "moa")
    assert run(*moa(place, "--cache", tmp_path / "cache"), "--output", tmp_path / "one") == 0
    assert_close_runs(tmp_path / "cached", tmp_path / "one", "moa")


def test_other_processes_read_what_fills_a_cache(place, tmp_path, monkeypatch, capsys):
    """A picture that broke after it was checked ends them all, and what was encoded before stays."""
    monkeypatch.setattr(shards, "SIZE", 3)
    picture = sorted((place / "world").rglob("*.jpg"))[6]
    read, readers, whole = Folder.read, tmp_path / "readers.txt", picture.read_bytes()

    def noted(self, index, epoch):
        with open(readers, "a", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        if self.ids[index] == picture.stem:
            picture.write_bytes(b"")
        return read(self, index, epoch)

    monkeypatch.setattr(Folder, "read", noted)
    try:
        assert_refused(capsys, tmp_path / "runs", *moa(place, "--cache", tmp_path / "cache"), "--output",
                       tmp_path / "runs" / "one", match=f"{picture.name}: cannot identify image file")
    finally:
        picture.write_bytes(whole)
    assert str(os.getpid()) not in readers.read_text(encoding="ascii").split()
    assert not multiprocessing.active_children()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2  # of 3


def test_caches_that_cannot_be_used(place, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    options = ["--output", tmp_path / "run"]
    assert_refused(capsys, tmp_path, *moa(place, "--cache", tmp_path / "mine"), *options,
                   match="mine holds other files")
    assert run(*moa(place, "--cache", tmp_path / "cache"), "--output", tmp_path / "first") == 0
    assert_refused(capsys, tmp_path, *moa(place, "--cache", tmp_path / "cache", "--samples", 7), *options,
                   match="count 8, not 7): give another folder")
    assert_refused(capsys, tmp_path, *options_of("moa", place), "--cache", tmp_path / "cache", *options,
                   match="--cache goes with --data")
    assert_refused(capsys, tmp_path, "vae", "--steps", 1, "--cache", tmp_path / "cache", *options,
                   match="cannot use --cache")


def test_a_run_that_reads_goes_on_where_it_was(place, tmp_path, monkeypatch):
    loss = training.STAGES["moa"].loss

    class Killed(BaseException):
        pass

    def killed(self, step):
        if step == 3:
            raise Killed
        return loss(self, step)

    options = [*moa(place), "--checkpoint-every", 2, "--output", tmp_path / "run"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.STAGES["moa"], "loss", killed)
        run(*options)
    assert run(*options, "--resume") == 0
    assert_same_run(tmp_path / "run", place / "streamed")


def test_the_seed_draws_other_augmentations(place):
    """But not with a cache, which serves runs with any seed."""
    config, folder = training.make_config("sd15", "moa", batch_size=4, bf16=False), place / "world"
    pictures, keys = [], []
    for seed in (0, 1):
        stage = training.STAGES["moa"](config, seed, torch.device("cpu"), place / "prior", folder)
        pictures.append(stage.samples.read(0).references)
        cached = training.STAGES["moa"](config, seed, torch.device("cpu"), place / "prior", folder,
                                      cache=Path("cache"))
        keys.append(cached.samples.key)
    assert (pictures[0] != pictures[1]).any() and keys[0] == keys[1]


def test_every_epoch_draws_its_own_augmentations(place):
    stage = make_stage("moa", place, steps=6, augment=True, data=place / "world")
    first, second = ({sample.caption: sample for step in steps for sample in stage.batch(step)}
                     for steps in ((0, 1), (2, 3)))
    assert len(first) == len(second) == 8
    assert any((first[c].references != second[c].references).any() for c in first)
    again = make_stage("moa", place, steps=6, augment=True, data=place / "world").batch(2)
    assert all((s.references == second[s.caption].references).all() for s in again)


def test_frozen_parts_in_bf16(place, tmp_path):
    plain = make_stage("moa", place, steps=2, data=place / "world")
    stage = make_stage("moa", place, steps=2, data=place / "world", bf16=True, frozen_bf16=True)
    for module in (stage.module, stage.encode.vae, stage.encode.text_encoder, stage.encode.image_encoder):
        for name, p in module.named_parameters():
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    with stage.autocast():
        loss = stage.loss(0)[0]
    assert loss.item() == pytest.approx(plain.loss(0)[0].item(), rel=0.03)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32
               for p in stage.module.parameters() if p.requires_grad)
    train_stage(make_stage("moa", place, steps=2, data=place / "world", bf16=True, frozen_bf16=True),
                tmp_path / "run")
    assert load_models(tmp_path / "run").image_encoder is not None


def test_the_last_layers_of_the_image_encoder_are_trained(place, tmp_path):
    stage = make_stage("moa", place, steps=4, data=place / "world", image_layers=1, frozen_bf16=True,
                       bf16=True, lr=1e-2, warmup=1)
    train_stage(stage, tmp_path / "run")
    before, after = (read_tensors(folder / "image_encoder.safetensors")
                     for folder in (place / "prior", tmp_path / "run"))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(".resblocks.0." in k for k in changed)  # the only layer there is
    assert Pipeline.load(tmp_path / "run", tmp_path / "run" / "moa.safetensors").prompt is not None
    with pytest.raises(ValueError, match="was trained together with its image encoder, which lies beside it"):
        Pipeline.load(place / "prior", tmp_path / "run" / "moa.safetensors")
    checkpoint, = (tmp_path / "run" / "checkpoints").iterdir()
    with pytest.raises(ValueError, match="trains the image encoder too"):
        export_moa.export(checkpoint, tmp_path / "other.safetensors")
    for wrong in ({"data": None}, {"cache": tmp_path / "cache"}):
        with pytest.raises(training.StageError, match="image_layers needs --data, and no --cache"):
            make_stage("moa", place, image_layers=1, **{"data": place / "world", **wrong})


def test_some_references_are_not_shown(place):
    stage = make_stage("moa", place, batch_size=1000, subject_probability=0.9, data=place / "world")
    present = torch.ones(1000, 2, dtype=torch.bool)
    present[:100, 1] = False
    shown = stage.draw_shown(0, present)
    assert not shown[:100, 1].any()
    assert 0.87 < shown[present].float().mean() < 0.93
    assert torch.equal(shown, stage.draw_shown(0, present))
    assert not torch.equal(shown, stage.draw_shown(1, present))
    always = make_stage("moa", place, batch_size=4, data=place / "world")
    assert torch.equal(always.draw_shown(0, present[:4]), present[:4])


def test_some_samples_count_as_a_whole(place):
    """And the others where the people are."""
    stage = make_stage("moa", place, batch_size=1000, masked_probability=0.7, data=place / "world")
    people = torch.rand(1000, 2, 2)
    region = stage.draw_region(0, people)
    whole = (region == 1).all((1, 2))
    assert 0.25 < whole.float().mean() < 0.35
    assert torch.equal(region[~whole], people[~whole])
    assert torch.equal(region, stage.draw_region(0, people))
    assert not torch.equal(region, stage.draw_region(1, people))
    always = make_stage("moa", place, batch_size=4, masked_probability=1.0, data=place / "world")
    assert always.draw_region(0, people) is people


@pytest.mark.parametrize("cached", [False, True])
def test_the_sd15_preset_trains(cached, place, tmp_path):
    """On models of SD1.5's structure."""
    options = ["moa", "--preset", "sd15", "--weights", place / "prior", "--data", place / "world",
               "--steps", 2, "--output", tmp_path / "run"]
    assert run(*options, *(["--cache", tmp_path / "cache"] if cached else [])) == 0
    training = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert (training["lr"], training["lambda_router"], training["max_people"]) == (5e-5, 1e-4, 4)
    assert all(line["loss"] > 0 for line in metrics_of(tmp_path / "run"))
