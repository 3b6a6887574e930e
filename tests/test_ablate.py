"""ablate.py: each row is another method, in training and in drawing, and is trained and measured."""
import json
from contextlib import ExitStack

import numpy as np
import pytest
import torch

import ablate
import moa.install
import moa.prompt
import stages.moa
import stages.stage
from conftest import small_models
from data import toyworld
from moa import MultimodalPrompt, PromptConfig, load_moa, moa_layers, record_routing, save_moa

T = torch.tensor([300, 700])


@pytest.fixture
def built(tmp_path):
    """Build a row's UNet as training does, change its routers, and load it again as drawing does.

    Returns both UNets; `build.state` is the base model's state."""
    def build(name: str):
        with ExitStack() as stack:
            for edit in ablate.ROWS[name].edits:
                stack.enter_context(edit())
            torch.manual_seed(0)
            base = small_models()["unet"]
            state = {k: v.clone() for k, v in base.state_dict().items()}
            unet, prompt = stages.moa.add_moa(base), MultimodalPrompt(PromptConfig(16, 16, 32, 16))
            with torch.no_grad():
                for _, _, layer in moa_layers(unet):
                    for p in layer.router.f.parameters():
                        if p.requires_grad:
                            p.normal_(std=0.3)
            save_moa(unet, prompt, tmp_path / "moa.safetensors", torch.float32)
            again = load(state, tmp_path)
        build.state = state
        return unet, again
    return build


def load(state: dict, folder):
    """The UNet that `folder`'s MoA file makes of a base model."""
    unet = small_models()["unet"]
    unet.load_state_dict(state)
    load_moa(unet, folder / "moa.safetensors")
    return unet


def routing_of(unet) -> dict:
    torch.manual_seed(1)
    with record_routing(unet) as routing, torch.no_grad():
        unet(torch.randn(2, 4, 8, 8), T, torch.randn(2, 5, 16))
    return dict(routing)


@pytest.mark.parametrize(("name", "fixed"), [
    ("moa", {}), ("one-branch", {(layer, kind): 1.0 for layer in range(16) for kind in ("self", "cross")}),
    ("cross-only", {(layer, "self"): 0.0 for layer in range(16)}),
    ("self-only", {(layer, "cross"): 0.0 for layer in range(16)}),
    ("decoder-only", {(layer, kind): 0.0 for layer in range(7) for kind in ("self", "cross")}),
    ("every-second", {(layer, kind): 0.0 for layer in range(1, 16, 2) for kind in ("self", "cross")}),
    ("router-16", {}), ("router-64", {}), ("router-deep", {})])
def test_where_the_personalized_expert_acts(built, name, fixed):
    for unet in built(name):
        for key, weights in routing_of(unet).items():
            personalized = weights[..., 1]
            if tuple(key) in fixed:
                assert torch.allclose(personalized, torch.full_like(personalized, fixed[tuple(key)]))
            else:
                assert personalized.std() > 1e-3
        trained = {n for n, p in unet.named_parameters() if p.requires_grad and ".router." in n}
        layers = {"router-16": 2, "router-64": 2, "router-deep": 3}.get(name, 1)
        assert len(trained) == (32 - len(fixed)) * 2 * layers  # weights and biases


def test_deeper_routers_are_of_their_layers_type():
    with ablate.deeper_routers(8):
        unet = moa.install.add_moa(small_models()["unet"].bfloat16())
    assert {p.dtype for *_, layer in moa_layers(unet) for p in layer.router.parameters()} == {torch.bfloat16}


def test_widths_of_routers(built):
    for width in (16, 64):
        for unet in built(f"router-{width}"):
            assert {layer.router.f[0].out_features for _, _, layer in moa_layers(unet)} == {width}


def test_nothing_stays_edited(built):
    def methods():
        return (moa.install.add_moa, stages.moa.add_moa, stages.moa.router_loss,
                moa.prompt.PositionalEncoding.forward)
    before = methods()
    for name in ("one-branch", "no-encoding", "mean-router-loss", "router-16"):
        built(name)
    assert methods() == before


def test_the_token_without_encoding_is_the_same_at_all_times():
    prompt = MultimodalPrompt(PromptConfig(16, 16, 32, 4))
    torch.nn.init.normal_(prompt.mlp[-1].weight)
    place, present = torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)
    text = torch.randn(2, 5, 16)
    arguments = text, torch.randn(2, 1, 16), place, present
    assert (prompt(*arguments, T)[0] - prompt(*arguments, T)[1]).abs().max() > 1e-3
    with ablate.no_encoding():
        tokens = prompt(*arguments, T)
        assert torch.equal(tokens[0], tokens[3]) and torch.equal(tokens, prompt(*arguments, T - 100))
        assert (tokens[0] - text).abs().max() > 1e-3  # the person is there


@pytest.mark.parametrize("name", ["one-branch", "cross-only", "decoder-only", "router-16"])
def test_the_file_of_a_row_needs_no_edit(built, name, tmp_path):
    _, inside = built(name)
    found, expected = routing_of(load(built.state, tmp_path)), routing_of(inside)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_training_without_pairs_of_attributes():
    everything = stages.stage.batch_indices(0, 0, 300, 300)
    with ablate.without_unseen_pairs():
        seeds = np.concatenate([stages.stage.batch_indices(0, step, 50, 300) for step in range(4)])
    assert set(seeds) < set(everything) and len(set(seeds)) == 200
    people = [[subject.identity for subject in toyworld.sample_scene(seed).subjects] for seed in range(300)]
    unseen = [seed for seed, several in enumerate(people) if any(map(ablate.has_unseen_pair, several))]
    assert 20 < len(unseen) < 100 and not set(unseen) & set(seeds)
    for pair in ablate.UNSEEN:  # each attribute alone is there
        for name, value in pair:
            assert any(getattr(person, name) == value for seed in seeds for person in people[seed])


def test_the_mean_of_the_router_loss():
    routing, mask = torch.rand(3, 8, 8), (torch.rand(3, 8, 8) > 0.5).float()
    whole = stages.moa.router_loss(routing, mask)
    with ablate.mean_router_loss():
        assert torch.allclose(stages.moa.router_loss(routing, mask), whole / 64)


def test_settings_of_rows():
    for name, row in ablate.ROWS.items():
        with ablate.preset(row.config):
            config = stages.make_config("toyworld", "moa")
        changed = {"steps": ablate.STEPS, **row.config}
        assert {key: getattr(config, key) for key in changed} == changed, name
    assert stages.make_config("toyworld", "moa").steps == 3250
    assert all(row.trained_by is None or row.trained_by in ablate.ROWS for row in ablate.ROWS.values())


@pytest.mark.parametrize("arguments, said", [
    (["one-branch-600", "--seed", "3"], "run the row one-branch first"),
    (["--table"], "there is no result"), (["moa", "--jobs", "0"], "--jobs must be at least 1"),
    (["moa", "--output", __file__], "is a file: give a folder's name")])
def test_refusals(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        ablate.main(["--output", str(tmp_path), *arguments])
    assert said in capsys.readouterr().err


def test_rows_are_trained_measured_and_not_done_twice(tmp_path, monkeypatch, capsys):
    """A row and one that shares its weights, then the table."""
    monkeypatch.setattr(ablate, "CASES", 2)
    monkeypatch.setattr(stages.moa.MoAStage, "sheet", lambda stage, path: None)  # takes longer than all else
    small = {"samples": 16, "steps": 2}
    rows = {"one-branch": ablate.Row("a", small, **ablate.FINETUNED),
            "one-branch-600": ablate.Row("b", edits=ablate.FINETUNED["edits"], trained_by="one-branch",
                                         evaluation={"prior-above": 1000, "start": 600, "steps": 4})}
    rows["one-branch"].evaluation["steps"] = 4
    monkeypatch.setattr(ablate, "ROWS", rows)
    monkeypatch.setattr(ablate, "BATCH_SIZE", 2)
    for name in rows:
        ablate.main([name, "--seed", "3", "--output", str(tmp_path)])
    results = [json.loads((tmp_path / name / "seed-3" / "results.json").read_text()) for name in rows]
    assert [r["settings"]["start"] for r in results] == [1000, 600]
    assert results[0]["settings"]["prior_above"] == 1000
    assert results[0]["run"]["sha256"]["moa"] == results[1]["run"]["sha256"]["moa"]
    assert np.allclose(results[0]["router"]["grid"]["people"]["mean"], 1)  # all personalized
    training = json.loads((tmp_path / "one-branch" / "seed-3" / "config.json").read_text())["training"]
    assert (training["seed"], training["steps"], training["lambda_router"]) == (3, 2, 3e-5)
    stamp = (tmp_path / "one-branch" / "seed-3" / "results.json").stat().st_mtime_ns
    ablate.main(["one-branch", "--seed", "3", "--output", str(tmp_path)])
    assert (tmp_path / "one-branch" / "seed-3" / "results.json").stat().st_mtime_ns == stamp
    monkeypatch.setattr(ablate, "SEEDS", (3,))
    capsys.readouterr()
    ablate.main(["--table", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[2:]] == ["| `one-branch`", "| `one-branch-600`"]
    assert (tmp_path / "tradeoff.png").stat().st_size > 5000


def test_the_spread_of_a_score():
    one = {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 64}
    other = {"mean": 0.6, "low": 0.5, "high": 0.7, "n": 64}
    assert ablate.cell([]) == "-"
    assert ablate.cell([one]) == "0.400 (0.300 to 0.500)"  # over the cases
    assert ablate.cell([one, other]) == "0.500 (0.400 to 0.600)"  # over the seeds
