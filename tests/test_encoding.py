"""The encoding of (t, l): what training does to it, and files that were written before it was scaled."""
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moa import MultimodalPrompt, PromptConfig, load_moa
from moa.prompt import PositionalEncoding
from models import load_models
from data.sample import ENCODED
from tests.stress.kill import write_base
from tests.test_train import small_place
from toyworld.rendered import render_cache
from train import STAGES, learning_rate_factor, make_config

T = torch.arange(0, 1000, 50)
LAYERS = torch.arange(16)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory of its own with a small base model of random weights."""
    folder = tmp_path_factory.mktemp("encoding")
    with small_place(folder):
        write_base(folder / "base")
        yield folder


@pytest.mark.parametrize("units, steps", [(PositionalEncoding.units, 200), ((1, 1), 40)],
                         ids=["scaled", "raw"])
def test_the_encoding_of_a_timestep_stays_itself_while_it_is_trained(units, steps, place, monkeypatch):
    """With the small preset on smaller models, 25 steps apart. With raw timesteps it is soon another one."""
    monkeypatch.setattr(PositionalEncoding, "units", units)
    config = make_config("toyworld", "moa", steps=steps, batch_size=1, samples=24)
    scenes = render_cache("scenes", config.samples)
    stage = STAGES["moa"](config, 0, torch.device("cpu"), scenes, place / "base", cache=ENCODED)
    encoding = stage.prompt.encoding
    trained = [p for p in stage.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, config.betas, weight_decay=config.weight_decay)
    first, history = encoding.frequencies.detach().clone(), []
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.lr * learning_rate_factor(step, config)
        stage.loss(stage.batch(step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            history.append(encoding(T, LAYERS))
    assert not torch.equal(encoding.frequencies, first)  # it is trained
    worst = min(F.cosine_similarity(before, after, dim=-1).min()
                for before, after in zip(history, history[25:], strict=False))
    assert worst > 0.99 if steps == 200 else worst < 0.9


def test_sd15s_whole_training_cannot_scramble_it():
    """40,000 steps of 5e-5 with random gradients: of 25 steps the phases move by 1.25e-3 rad at most."""
    encoding = PositionalEncoding(64)
    optimizer = torch.optim.AdamW([encoding.frequencies], lr=5e-5, betas=(0.9, 0.999), weight_decay=0.01)
    checked = []
    for step in range(40_000):
        encoding.frequencies.grad = torch.randn(2, 32)
        optimizer.step()
        if step % 4000 in (0, 25):
            checked.append(encoding(T, LAYERS).detach())
    for before, after in zip(checked[::2], checked[1::2], strict=True):
        assert F.cosine_similarity(before, after, dim=-1).min() > 0.95
    near_and_far(encoding)


def test_near_timesteps_are_near_at_the_start():
    near_and_far(PositionalEncoding(1536))


@torch.no_grad()
def near_and_far(encoding: PositionalEncoding) -> None:
    t = torch.arange(0, 700, 25)
    here, near, far = (encoding(t + apart, LAYERS) for apart in (0, 10, 300))
    assert F.cosine_similarity(here, near, dim=-1).mean() > 0.8
    assert F.cosine_similarity(here, far, dim=-1).mean() < 0.4


@torch.no_grad()
def test_a_file_of_before_draws_what_it_drew(world, tmp_path):
    """Frequencies of raw timesteps, without a word in the metadata: the same phases, bit for bit."""
    state = load_file(world / "moa.safetensors")
    with safe_open(world / "moa.safetensors", "pt") as file:
        config = json.loads(file.metadata()["moa"])
    del config["encoding_units"]
    raw = torch.randn(2, 16) * torch.tensor([[0.03], [2.0]])
    save_file({**state, "prompt.encoding.frequencies": raw}, tmp_path / "old.safetensors",
              {"moa": json.dumps(config)})
    prompt = load_moa(load_models(world).unet, tmp_path / "old.safetensors")
    angles = T[None, :, None] * raw[0] + LAYERS[:, None, None] * raw[1]
    assert torch.equal(prompt.encoding(T, LAYERS), torch.cat([angles.sin(), angles.cos()], dim=-1))


def test_encoding_has_no_other_size_than_the_prompt():
    assert MultimodalPrompt(PromptConfig(8, 8, 16, 4)).encoding.frequencies.shape == (2, 8)
