"""What a run tells about itself: metrics.jsonl, TensorBoard curves, routing sheets."""
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from data.sample import ENCODED
from moa import ExpertContext, moa_layers
from moa.loss import mean_routing, object_loss, router_loss
from moa.routing import forced
from tests.stress.kill import write_base
from tests.test_train import Killed, metrics_of, run, small_place
from toyworld.rendered import render_cache
from training import MoAStage, distributed, log
from training.encode import Encoded

LISTS = ("prior_weight_people_by_layer", "prior_weight_background_by_layer", "subject_attention_by_layer")
NORMS = ("gradient_norm_experts", "gradient_norm_routers", "gradient_norm_prompt")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A working directory of its own with a base model."""
    folder = tmp_path_factory.mktemp("health")
    with small_place(folder):
        write_base(Path("base"))
        yield folder


def moa_stage(**changes) -> MoAStage:
    """Ready to train, with routers and subject tokens that differ from where they start."""
    config = train.make_config("toyworld", "moa", batch_size=6, samples=24, **changes)
    scenes = render_cache("scenes", 24, workers=1)
    stage = MoAStage(config, 0, torch.device("cpu"), scenes, Path("base"), cache=ENCODED)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, _, layer in moa_layers(stage.unet):
            layer.router.f.weight.copy_(torch.randn(layer.router.f.weight.shape, generator=generator))
        weight = stage.prompt.mlp[-1].weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return stage


def test_object_loss_of_no_layers_is_nothing():
    assert object_loss([], torch.ones(2, 1, 4, 4), torch.ones(2, 1, dtype=torch.bool)) == 0


def shrunk(maps: torch.Tensor, size: int) -> np.ndarray:
    """(B, S, h, w) masks on a layer's grid, (B, S, size * size)."""
    small = F.interpolate(maps, (size, size), mode="bilinear", antialias=True)
    return small.flatten(2).double().numpy()


@torch.no_grad()
def by_hand(stage: MoAStage, step: int) -> dict[str, list[float]]:
    """The three lists, pixel by pixel, from the inputs of every layer."""
    batch = stage.batch(step)
    x, t, text, masks, present, positions, features = (
        batch[name] for name in ("x", "t", "text", "masks", "present", "positions", "features"))
    inputs, hooks = {}, []
    for layer, kind, moa in moa_layers(stage.unet):
        hooks.append(moa.register_forward_pre_hook(
            lambda module, args, key=(layer, kind): inputs.__setitem__(key, (module, *args))))
    context = ExpertContext(text, stage.prompt(text, features, positions, present, t))
    stage.unet(x, t, context)
    for hook in hooks:
        hook.remove()
    people = masks.sum(1).clamp(max=1)
    found = {name: [] for name in LISTS}
    for layer in range(16):
        sums = dict.fromkeys(("people", "background", "attention"), 0.0)
        counts = dict.fromkeys(sums, 0.0)
        for kind in ("self", "cross"):
            module, z, *_ = inputs[layer, kind]
            side = int(z.shape[1] ** 0.5)
            weights = (z @ module.router.f.weight.T + module.router.f.bias).softmax(-1)[..., 0]
            large = F.interpolate(weights.reshape(-1, 1, side, side), people.shape[-2:], mode="bilinear")
            large = large[:, 0]
            for b in range(len(people)):
                sums["people"] += float((large[b] * people[b]).sum()) / 2
                sums["background"] += float((large[b] * (1 - people[b])).sum()) / 2
        counts["people"], counts["background"] = float(people.sum()), float((1 - people).sum())
        module, z, _ = inputs[layer, "cross"]
        expert, inside = module.personalized, shrunk(masks, int(z.shape[1] ** 0.5))
        for b in range(len(people)):
            for s in range(masks.shape[1]):
                if not present[b, s]:
                    continue
                means = []
                q, k = expert.to_q(z[b]), expert.to_k(context.personalized[layer][b])
                for q_head, k_head in zip(q.chunk(expert.heads, -1), k.chunk(expert.heads, -1), strict=True):
                    attention = (q_head @ k_head.T / q_head.shape[-1] ** 0.5).softmax(-1)
                    column = attention[:, positions[b, s]].double().numpy()
                    means.append((column * inside[b, s]).sum() / inside[b, s].sum())
                sums["attention"] += np.mean(means)
                counts["attention"] += 1
        for name, part in zip(LISTS, sums, strict=True):
            found[name].append(sums[part] / counts[part])
    return found


def test_the_lists_are_what_one_counts_by_hand():
    stage = moa_stage()
    stage.loss(stage.batch(3))[0].backward()
    health, expected = stage.health(), by_hand(stage, 3)
    for name in LISTS:
        assert len(health[name]) == 16
        assert health[name] == pytest.approx(expected[name], rel=1e-3), name
        assert np.ptp(health[name]) > 1e-3  # layers differ here, so a wrong order would be seen


def test_forced_routers_are_read_back():
    """Block 5 gives all to the prior in self- and half in cross-attention, block 6 nothing."""
    stage = moa_stage()
    for layer, kind, moa in moa_layers(stage.unet):
        if layer in (5, 6):
            weight = torch.tensor(0.0 if layer == 6 else 1.0 if kind == "self" else 0.5)
            moa.overrides.append(partial(forced, weight))
    stage.loss(stage.batch(0))[0].backward()
    for p in stage.module.parameters():  # forced routers have no gradient
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    health = stage.health()
    for name in LISTS[:2]:
        assert health[name][5] == pytest.approx(0.75)
        assert health[name][6] == pytest.approx(0.0)


def test_nobody_in_the_batch_is_zero(monkeypatch):
    stage = moa_stage(null_probability=1.0)
    encoded = Encoded.__call__
    monkeypatch.setattr(Encoded, "__call__", lambda self, step, turn: {
        **(batch := encoded(self, step, turn)), "masks": torch.zeros_like(batch["masks"])})
    stage.loss(stage.batch(0))[0].backward()
    health = stage.health()
    assert health["prior_weight_people_by_layer"] == [0.0] * 16
    assert health["subject_attention_by_layer"] == [0.0] * 16
    assert min(health["prior_weight_background_by_layer"]) > 0


def test_the_losses_see_their_layers_only():
    stage = moa_stage(router_layers=(1, 5), object_layers=(6, 9))
    _, parts = stage.loss(stage.batch(0))
    routing, maps, masks, present = stage.watched
    people = masks.sum(1).clamp(max=1)
    weights = [routing[layer, kind][..., 0] for layer in (1, 5) for kind in ("self", "cross")]
    router = router_loss(mean_routing(weights, *people.shape[-2:]), people)
    assert parts["router"].item() == pytest.approx(router.item(), rel=1e-5)
    balance = object_loss([maps[6], maps[9]], masks, present)
    assert parts["object"].item() == pytest.approx(balance.item(), rel=1e-5)


def test_means_of_vectors_and_scalars():
    values = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3), "c": torch.tensor([[4.0], [5.0]])}
    assert distributed.mean(values) == {"a": [1.0, 2.0], "b": 3.0, "c": [[4.0], [5.0]]}


def test_a_run_logs_its_health(place, monkeypatch):
    assert run("moa", "--steps", 3, "--samples-every", 3, "--weights", "base", "--output", place / "run") == 0
    for line in metrics_of(place / "run"):
        assert all(len(line[name]) == 16 for name in LISTS)
        total = sum(line[name] ** 2 for name in NORMS) ** 0.5
        assert total == pytest.approx(line["gradient_norm"], rel=1e-4)
        for value in [line["memory_gb"], *line[LISTS[0]], *(line[name] for name in NORMS)]:
            assert value == float(f"{value:.5g}")
        assert 0.05 < line["memory_gb"] < 50
    first = metrics_of(place / "run")[0]
    assert first[LISTS[0]] == first[LISTS[1]] == [0.5] * 16  # the routers start at zero
    config = train.PRESETS["toyworld"]["moa"]
    for line in metrics_of(place / "run"):  # over the layers of Eq. 10
        mean = np.mean([line[LISTS[1]][layer] for layer in config.router_layers])
        assert line["prior_weight_background"] == pytest.approx(mean, rel=1e-3)


def test_peak_memory_is_the_kernel_s():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = int(status["VmHWM"].split()[0])
    assert log.peak_memory(torch.device("cpu")) == pytest.approx(1024 * kilobytes, rel=0.05)


def test_a_routing_sheet_beside_each_sample_sheet(place):
    """A map per layer and kind of the second step; above t = 800 the prior draws alone."""
    from images import NO_MAP, PERSONALIZED, PRIOR
    folder = place / "run" / "samples"
    assert sorted(os.listdir(folder)) == ["000003.png", "000003_routing.png"]
    with Image.open(folder / "000003_routing.png") as image:
        pixels = np.array(image.convert("RGB")).astype(int)
    between = np.array(PRIOR) + np.array(PERSONALIZED)
    half = (np.abs(2 * pixels - between).max(-1) < 6).sum()
    none = (pixels == NO_MAP).all(-1).sum()
    assert half > 32 * 30 * 30
    assert none > 32 * 30 * 30


# TensorBoard -------------------------------------------------------------------------------------


def events_of(output: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return events.Reload()


def test_curves_and_pictures_of_a_run_that_was_killed(tmp_path, monkeypatch):
    """All of metrics.jsonl, every step once, no step of the life that was lost."""
    pytest.importorskip("tensorboard")
    loss, done = MoAStage.loss, []

    def other_life(self, batch):
        done.append(batch)
        if len(done) == 6:
            raise Killed
        value, parts = loss(self, batch)
        return (value, {**parts, "masked": parts["masked"] + 100}) if len(done) == 5 else (value, parts)

    options = ["moa", "--steps", 6, "--checkpoint-every", 2, "--samples-every", 3, "--weights", "base",
               "--output", tmp_path / "run"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MoAStage, "loss", other_life)
        run(*options)
    file, = (tmp_path / "run" / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes() + b"\x18\0\0\0\0\0\0\0half a record")
    assert run(*options, "--resume") == 0
    events, logged = events_of(tmp_path / "run"), metrics_of(tmp_path / "run")
    expected = {name for name, value in logged[0].items() if not isinstance(value, list)} - {"step"}
    expected |= {f"{name}/layer_{layer:02d}" for name in LISTS for layer in range(16)}
    assert set(events.Tags()["scalars"]) == expected
    for tag in expected:
        name, _, layer = tag.partition("/layer_")
        values = [line[name][int(layer)] if layer else line[name] for line in logged]
        curve = events.Scalars(tag)
        assert [point.step for point in curve] == [1, 2, 3, 4, 5, 6], tag
        assert [point.value for point in curve] == pytest.approx(values, rel=1e-6), tag
    assert set(events.Tags()["images"]) == {"samples", "samples_routing"}
    for tag in ("samples", "samples_routing"):
        assert [image.step for image in events.Images(tag)] == [3, 6]
        assert events.Images(tag)[0].encoded_image_string.startswith(b"\x89PNG")
