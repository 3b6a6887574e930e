"""What an editor may rely on: each test makes the edit, and nothing else."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from parity_full import randomize
from safetensors.torch import load_file
from test_moa import SMALL, base, contexts, inputs, new_prompt
from torch import Tensor

import moa.mixture
from moa import (add_moa, force_routing, load_moa, moa_layers, record_routing, save_moa, scale_personalized,
                 sparse_routing)

ROOT = Path(__file__).parents[1]


class HardRouter(nn.Module):
    """No layer `f`, no linear start, a buffer, and weights that are exactly 0 or 1."""

    def __init__(self, dim: int, num_experts: int = 2, hidden: int | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.score = nn.Linear(dim, num_experts)
        self.register_buffer("temperature", torch.full((), 0.5))

    def forward(self, z: Tensor) -> Tensor:
        soft = (self.score(self.norm(z)) / self.temperature).softmax(-1)
        return (soft == soft.max(-1, keepdim=True).values).to(z) + (soft - soft.detach())


def trained(unet: nn.Module, prompt: nn.Module) -> None:
    """A few steps of everything that has requires_grad."""
    parameters = [p for p in [*unet.parameters(), *prompt.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    x, t, *rest = inputs()
    for _ in range(3):
        optimizer.zero_grad()
        unet(x, t, contexts(prompt, *rest)).square().mean().backward()
        optimizer.step()


@pytest.fixture
def hard(monkeypatch) -> None:
    monkeypatch.setattr(moa.mixture, "Router", HardRouter)


def test_another_router_is_trained_saved_and_loaded(hard, tmp_path):
    unet, prompt = add_moa(base(SMALL)), new_prompt(SMALL)
    before = {k: v.clone() for k, v in unet.state_dict().items() if ".router." in k}
    trained(unet, prompt)
    for _, _, layer in moa_layers(unet):
        layer.router.temperature.fill_(0.25)
    save_moa(unet, prompt, tmp_path / "moa.safetensors", torch.float32)
    state = load_file(tmp_path / "moa.safetensors")
    assert before.keys() <= state.keys() and any(k.endswith("router.temperature") for k in state)
    assert all(not torch.equal(state[k], v) for k, v in before.items())
    again = base(SMALL)
    loaded = load_moa(again, tmp_path / "moa.safetensors")
    assert not any(module.training for module in (*again.modules(), *loaded.modules()))
    x, t, *rest = inputs()
    with torch.no_grad():
        assert torch.equal(again(x, t, contexts(loaded, *rest)), unet(x, t, contexts(prompt.eval(), *rest)))


@torch.no_grad()
def test_another_router_is_watched_overridden_and_made_sparse(hard):
    unet, prompt = add_moa(base(SMALL)), new_prompt(SMALL)
    for _, _, layer in moa_layers(unet):
        randomize(layer.personalized, 3)
        randomize(layer.router.score, 4)
    x, t, *rest = inputs()
    context = contexts(prompt, *rest)
    plain = base(SMALL)(x, t, rest[0])
    with record_routing(unet) as routing:
        dense = unet(x, t, context)
        assert all(((r == 0) | (r == 1)).all() and (r.sum(-1) == 1).all() for r in routing.values())
        assert len(routing) == 8
        with force_routing(unet, 0.3):
            unet(x, t, context)
        assert all(torch.allclose(r, torch.tensor([0.3, 0.7])) for r in routing.values())
        with scale_personalized(unet, 0.5):
            unet(x, t, context)
        assert all(set(r[..., 1].unique().tolist()) <= {0.0, 0.5} for r in routing.values())
    with force_routing(unet, 1.0):
        assert torch.equal(unet(x, t, context), plain)
    with sparse_routing(unet, 0.0):
        assert torch.allclose(unet(x, t, context), dense, atol=1e-5)
    with sparse_routing(unet, 1.0):
        assert torch.equal(unet(x, t, context), plain)


class ThreeExperts(moa.mixture.MixtureOfAttention):
    """As one more entry in its experts makes it."""

    def __init__(self, prior: nn.Module, layer: int, router_hidden: int | None = None):
        super().__init__(prior, layer, router_hidden)
        self.add_module("style", randomize(type(prior)(
            prior.to_q.in_features, prior.to_k.in_features, prior.heads), layer))
        self.names = (*self.names, "style")
        self.router = randomize(moa.mixture.Router(prior.to_q.in_features, 3, router_hidden), layer)


@torch.no_grad()
@pytest.mark.parametrize("inside", [force_routing, scale_personalized, sparse_routing])
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_three_experts_share_one_under_every_override(inside, value, monkeypatch):
    monkeypatch.setattr("moa.install.MixtureOfAttention", ThreeExperts)
    unet = add_moa(base(SMALL))
    x, t, text, *_ = inputs()
    with record_routing(unet) as routing:
        dense = unet(x, t, text)
        own = {key: r[..., 1:] for key, r in routing.items()}
        with inside(unet, value):
            out = unet(x, t, text)
    assert all(r.shape[-1] == 3 and torch.allclose(r.sum(-1), torch.ones(())) for r in routing.values())
    if inside is force_routing and value < 1:  # the others share the rest as they did
        first = (0, "self")
        shares = own[first] / own[first].sum(-1, keepdim=True)
        assert torch.allclose(routing[first][..., 1:], (1 - value) * shares, atol=1e-6)
    same = {force_routing: None, scale_personalized: 1.0, sparse_routing: 0.0}[inside]
    assert torch.allclose(out, dense, atol=1e-5) == (value == same)
    base_at = {force_routing: 1.0, scale_personalized: 0.0, sparse_routing: 1.0}[inside]
    assert torch.equal(out, base(SMALL)(x, t, text)) == (value == base_at)


EDITS = {
    # A third expert: one more entry.
    "moa/mixture.py": [
        ('"personalized": copy.deepcopy(prior).requires_grad_(True)}',
         '"personalized": copy.deepcopy(prior).requires_grad_(True),\n'
         '                   "style": copy.deepcopy(prior).requires_grad_(True)}'),
        # Another router: another class.
        ("class Router(nn.Module):", "class LinearRouter(nn.Module):"),
        ("class MixtureOfAttention(nn.Module):",
         "class Router(nn.Module):\n"
         "    def __init__(self, dim, num_experts, hidden=None):\n"
         "        super().__init__()\n"
         "        self.mix = nn.Bilinear(dim, dim, num_experts)\n\n"
         "    def forward(self, z):\n"
         "        return self.mix(z, z).softmax(-1)\n\n\n"
         "class MixtureOfAttention(nn.Module):")],
    # A new loss: a function, and a term in the sum.
    "moa/loss.py": [
        ('        "object": (lambda_object,', '        "smooth": (1e-3, smoothness_loss(routing)),\n'
                                             '        "object": (lambda_object,'),
        ("def masked_loss(", "def smoothness_loss(routing: Tensor) -> Tensor:\n"
                             "    return routing.diff(dim=1).square().mean()\n\n\ndef masked_loss(")],
}


def test_the_edits_as_a_reader_makes_them(tmp_path):
    """A third expert, another router and a new loss, in the files; then train.py and sample.py as ever."""
    skipped = shutil.ignore_patterns(".*", "__pycache__", "runs", "docs", "tests", "*.safetensors")
    shutil.copytree(ROOT, tmp_path / "code", ignore=skipped)
    world = tmp_path / "code" / "weights" / "toyworld"
    for file in (ROOT / "weights" / "toyworld").glob("*.safetensors"):
        if file.name != "moa.safetensors":
            (world / file.name).symlink_to(file)
    for name, changes in EDITS.items():
        text = (tmp_path / "code" / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (tmp_path / "code" / name).write_text(text)

    def run(*command: object) -> None:
        done = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path / "code",
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("train.py", "moa", "--weights", world, "--output", "run", "--samples", 8, "--steps", 2,
        "--batch-size", 2, "--log-every", 1, "--samples-every", 0)
    lines = (tmp_path / "code" / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["smooth"] > 0 for line in lines[1:])
    state = load_file(tmp_path / "code" / "run" / "moa.safetensors")
    assert sum(".style." in k for k in state) == 160 and sum(".router.mix." in k for k in state) == 64
    run("sample.py", "--weights", "run", "--prompt", "a woman on the beach", "--subject", "examples/zoe.png",
        "--steps", 2, "--seed", 0, "--strength", 0.5, "--sparse", 0.1, "--save-routing", "routing.png")
    assert (tmp_path / "code" / "sample.png").exists() and (tmp_path / "code" / "routing.png").exists()


def test_what_is_trained_is_what_has_requires_grad(tmp_path):
    """A layer of the base that is unfrozen too is in the file, under its own name."""
    unet, prompt = add_moa(base(SMALL)), new_prompt(SMALL)
    unet.conv_out.requires_grad_(True)
    trained(unet, prompt)
    save_moa(unet, prompt, tmp_path / "moa.safetensors", torch.float32)
    again = base(SMALL)
    load_moa(again, tmp_path / "moa.safetensors")
    assert torch.equal(again.conv_out.weight, unet.conv_out.weight)
    assert not torch.equal(again.conv_out.weight, base(SMALL).conv_out.weight)
    frozen = {k for k, p in unet.named_parameters() if not p.requires_grad}
    assert not frozen & load_file(tmp_path / "moa.safetensors").keys()
    for p in unet.parameters():  # as somebody does who only draws
        p.requires_grad_(False)
    save_moa(unet, prompt, tmp_path / "again.safetensors", torch.float32)
    before, kept = (load_file(tmp_path / f"{name}.safetensors").keys() for name in ("moa", "again"))
    assert kept == before - {"conv_out.weight", "conv_out.bias"}
