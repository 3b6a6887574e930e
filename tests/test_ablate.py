"""ablate.py: each experiment is another method, in training and in drawing, and is trained and measured."""
import json
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import ablate
import evaluate
import moa.checkpoint
import moa.loss
import moa.prompt
import toyworld
import train
import training.moa
import training.stage
from ablate import EXPERIMENTS, Experiment
from conftest import small_models
from moa import MultimodalPrompt, PromptConfig, load_moa, moa_layers, record_routing, save_moa

T = torch.tensor([300, 700])
ALL = {(layer, kind) for layer in range(16) for kind in ("self", "cross")}
# Experiment -> the personalized expert's weight where no router is, and where that is.
FIXED = {"one-branch": (1, ALL), "cross-only": (0, {(layer, kind) for layer, kind in ALL if kind == "self"}),
         "self-only": (0, {(layer, kind) for layer, kind in ALL if kind == "cross"}),
         "decoder-only": (0, {(layer, kind) for layer, kind in ALL if layer < 7}),
         "every-second": (0, {(layer, kind) for layer, kind in ALL if layer % 2})}
HIDDEN = {"router-16": [16], "router-64": [64], "router-deep": [16, 16]}


def routing_of(unet: torch.nn.Module) -> dict:
    torch.manual_seed(1)
    with record_routing(unet) as routing, torch.no_grad():
        unet(torch.randn(2, 4, 8, 8), T, torch.randn(2, 5, 16))
    return {tuple(key): weights[..., 1] for key, weights in routing.items()}


@pytest.mark.parametrize("name", ["moa", *FIXED, *HIDDEN])
def test_where_the_personalized_expert_acts(name, tmp_path):
    """As training builds it, and in what drawing loads; but for a deeper router that needs no edit."""
    torch.manual_seed(0)
    base, again = small_models()["unet"], small_models()["unet"]
    again.load_state_dict(base.state_dict())
    with EXPERIMENTS[name].edit():
        unet = training.moa.add_moa(base)
        for _, _, layer in moa_layers(unet):
            for p in layer.router.parameters():
                if p.requires_grad:
                    torch.nn.init.normal_(p, std=0.3)
        prompt = MultimodalPrompt(PromptConfig(16, 16, 32, 16))
        save_moa(unet, prompt, tmp_path / "moa.safetensors", torch.float32)
        if name == "router-deep":
            load_moa(again, tmp_path / "moa.safetensors")
    if name != "router-deep":
        load_moa(again, tmp_path / "moa.safetensors")
    weight, fixed = FIXED.get(name, (None, set()))
    routing = routing_of(unet)
    for key, found in routing_of(again).items():
        assert torch.equal(found, routing[key])
        if key in fixed:
            assert torch.allclose(found, torch.full_like(found, weight))
        else:
            assert found.std() > 1e-3
    widths = [p.shape[0] for p in next(moa_layers(unet))[2].router.parameters() if p.ndim == 2]
    assert widths == [*HIDDEN.get(name, []), 2]
    trained = [n for n, p in unet.named_parameters() if p.requires_grad and ".router." in n]
    assert len(trained) == (32 - len(fixed)) * 2 * len(widths)  # weights and biases


def test_nothing_stays_edited():
    def methods():
        return (moa.checkpoint.add_moa, training.moa.add_moa, moa.loss.router_loss,
                moa.prompt.PositionalEncoding.forward, training.stage.batch_indices)
    before = methods()
    for name, experiment in EXPERIMENTS.items():
        with experiment.edit():
            assert (methods() == before) == (experiment.edit is ablate.nullcontext), name
        assert methods() == before, name


def test_the_token_without_encoding_is_the_same_at_all_times():
    prompt = MultimodalPrompt(PromptConfig(16, 16, 32, 4))
    torch.nn.init.normal_(prompt.mlp[-1].weight)
    position, present = torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)
    text = torch.randn(2, 5, 16)
    arguments = text, torch.randn(2, 1, 16), position, present
    with ablate.no_encoding():
        tokens = prompt(*arguments, T)
        assert torch.equal(tokens[0], tokens[3]) and torch.equal(tokens, prompt(*arguments, T - 100))
        assert (tokens[0] - text).abs().max() > 1e-3  # the person is there


def test_training_without_pairs_of_attributes():
    with ablate.without_unseen_pairs():
        seeds = np.concatenate([training.stage.batch_indices(0, step, 50, 300) for step in range(4)])
    people = [[subject.identity for subject in toyworld.sample_scene(seed).subjects] for seed in range(300)]
    unseen = [seed for seed, several in enumerate(people) if any(map(ablate.has_unseen_pair, several))]
    assert len(set(seeds)) == 200 and 20 < len(unseen) < 100 and not set(unseen) & set(seeds)
    for pair in ablate.UNSEEN:  # each attribute alone is there
        for name, value in pair:
            assert any(getattr(person, name) == value for seed in seeds for person in people[seed])


def test_the_mean_of_the_router_loss():
    routing, mask = torch.rand(3, 8, 8), (torch.rand(3, 8, 8) > 0.5).float()
    whole = moa.loss.router_loss(routing, mask)
    with ablate.mean_router_loss():
        assert torch.allclose(moa.loss.router_loss(routing, mask), whole / 64)


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_trains_as_a_cpu_does(gpu, tmp_path, monkeypatch):
    """As a graph, which is faster, and in fp32; drawing, too."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(train, "main", lambda: seen.append("--graph" in sys.argv))
    monkeypatch.setattr(evaluate, "main", lambda flags: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    ablate.main(["half", "--output", str(tmp_path)])
    assert seen == [gpu, before and not gpu] and torch.backends.cudnn.allow_tf32 == before


def test_settings_of_experiments():
    for name, experiment in EXPERIMENTS.items():
        with ablate.preset(experiment.config):
            config = train.make_config("toyworld", "moa")
        changed = {"steps": ablate.STEPS, "batch_size": ablate.BATCH_SIZE, **experiment.config}
        assert {key: getattr(config, key) for key in changed} == changed, name
        assert experiment.trained_by is None or experiment.trained_by in EXPERIMENTS


@pytest.mark.parametrize(("arguments", "said"), [
    (["one-branch-600"], "run the experiment one-branch first"), (["--table"], "there is no result")])
def test_refusals(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        ablate.main(["--output", str(tmp_path), *arguments])
    assert said in capsys.readouterr().err


def test_without_runs_the_table_is_the_one_that_ships(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ablate.main(["--table"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == (ablate.SHIPPED / "README.md").read_text().splitlines()[4:7]
    assert not list(tmp_path.iterdir())


def test_experiments_are_trained_measured_and_not_done_twice(tmp_path, monkeypatch, capsys):
    """One, and another that shares its weights; then the table."""
    monkeypatch.setattr(ablate, "CASES", 2)
    monkeypatch.setattr(training.moa.MoAStage, "sheet", lambda stage, path: None)  # it is slow
    small = {"samples": 16, "steps": 2, "batch_size": 4}
    monkeypatch.setattr(ablate, "EXPERIMENTS", {
        "one-branch": Experiment("a", small, ablate.one_branch, {"prior-above": 1000, "steps": 4}),
        "one-branch-600": Experiment("b", trained_by="one-branch", edit=ablate.one_branch,
                                     evaluation={"prior-above": 1000, "start": 600, "steps": 4})})
    folders = [tmp_path / name / "seed-3" for name in ablate.EXPERIMENTS]
    for name in ablate.EXPERIMENTS:
        ablate.main([name, "--seed", "3", "--output", str(tmp_path)])
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [r["settings"]["start"] for r in results] == [1000, 600]
    assert results[0]["run"]["sha256"]["moa"] == results[1]["run"]["sha256"]["moa"]
    assert np.allclose(results[0]["router"]["grid"]["people"]["mean"], 1)  # all personalized
    recorded = json.loads((folders[0] / "config.json").read_text())["training"]
    assert (recorded["seed"], recorded["steps"], recorded["batch_size"]) == (3, 2, 4)
    capsys.readouterr()
    ablate.main(["one-branch", "--seed", "3", "--output", str(tmp_path)])
    assert "results.json is there already" in capsys.readouterr().out
    ablate.main(["--table", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    chance = f"{results[0]['prior_identity']['mean']:.3f}"
    assert lines[2].startswith(f"| the prior alone, nobody put in | | {chance} | - ")
    assert [line.split(":")[0] for line in lines[3:5]] == ["| `one-branch`", "| `one-branch-600`"]
    assert (tmp_path / "tradeoff.png").stat().st_size > 5000


def test_experiments_that_fail_are_said_at_the_end(tmp_path, monkeypatch, capsys):
    """And those whose results are there do not run again."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho $2 >> $6/started; exit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setitem(train.STAGES, "moa", Mock())
    monkeypatch.setattr(ablate, "render_cache", Mock())
    (ablate.folder_of(tmp_path, "half", 0)).mkdir(parents=True)
    (ablate.folder_of(tmp_path, "half", 0) / "results.json").touch()
    with pytest.raises(SystemExit, match="1"):
        ablate.main(["--all", "--jobs", "2", "--output", str(tmp_path)])
    started = (tmp_path / "started").read_text().split()
    expected = [*EXPERIMENTS] * 3
    expected.remove("half")
    assert sorted(started) == sorted(expected)
    assert capsys.readouterr().out.count("failed, see") == len(started)


def test_a_score_over_seeds():
    one = {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 64}
    other = {"mean": 0.6, "low": 0.56, "high": 0.7, "n": 64}
    assert ablate.over_seeds([{"mean": None, "low": None, "high": None, "n": 0}]) == "-"
    assert ablate.over_seeds([one]) == "0.400 (0.300 to 0.500)"
    assert ablate.over_seeds([one, other]) == "0.500 (0.430 to 0.600)"
    assert ablate.over_seeds([one, {"mean": 0.5, "n": 64}]) == "0.450 (0.350 to 0.550)"


def measured(values: list, numbers=(0, 1, 2, 3)) -> dict:
    """What results.json holds of one score."""
    counted = [value for value in values if value is not None]
    return {"identity": {"mean": np.mean(counted), "n": len(counted)},
            "cases": {"number": list(numbers), "identity": values}}


def test_how_far_an_experiment_is_from_the_method():
    found = {"moa": {0: measured([0.1, 0.3, 0.5, 0.7]), 1: measured([0.2, 0.4, 0.6, 0.8])},
             "half": {0: measured([0.2, 0.5, 0.6, None]), 1: measured([0.5, 0.6, 0.9, 0.8]),
                      2: measured([0.9] * 4)},
             "double": {0: {"identity": {"mean": 0.5, "n": 4}}, 1: measured([0.5] * 4, (4, 5, 6, 7))}}
    assert ablate.shared_seeds(found, "half") == ([0, 1], [])  # seed 2 the method does not have
    assert ablate.shared_seeds(found, "double") == ([], [0])  # without cases, and of other cases
    assert ablate.difference(found, "double", "identity") == ""
    means = [[0.4, 0.5], [1.3 / 3, 0.7, 0.9], [0.5, 0.5]]
    squares = sum(np.sum((np.array(seeds) - np.mean(seeds)) ** 2) for seeds in means)
    deviation, freedom = ablate.spread_of_seeds(found, "identity")
    assert (deviation, freedom) == (pytest.approx(np.sqrt(squares / 4)), 4)
    constant = {"no-encoding": {0: measured([0.0] * 4), 1: measured([0.0] * 4)}}  # as routers' that are
    assert ablate.spread_of_seeds(found | constant, "identity") == (deviation, freedom)
    # Case by case: (.1 + .3) / 2, (.2 + .2) / 2, (.1 + .3) / 2; the last case has no number.
    assert ablate.difference(found, "half", "identity") == f"+0.200 ± {2 * deviation:.3f}"
    # A third seed of which only means are left: (.2 + .2 + .5) / 3, the cases' error as before, which is 0.
    found["moa"][2] = {"identity": {"mean": 0.4, "n": 4}}
    deviation, _ = ablate.spread_of_seeds(found, "identity")
    assert ablate.shared_seeds(found, "half") == ([0, 1], [2])
    error = 2 * deviation * (2 / 3) ** 0.5
    assert ablate.difference(found, "half", "identity") == f"+0.300 ± {error:.3f}"
    only = {"moa": {0: found["moa"][0]}, "half": {0: found["half"][0]}}  # one seed: the cases' error alone
    error = np.std([0.1, 0.2, 0.1], ddof=1) / np.sqrt(3)
    assert ablate.difference(only, "half", "identity") == f"+0.133 ± {2 * error:.3f}"
    # In bold once enough seeds say what another one changes.
    only["no-encoding"] = {seed: measured([0.1 + 0.001 * seed] * 4) for seed in range(1 + ablate.ENOUGH)}
    assert ablate.difference(only, "half", "identity").startswith("**+0.133 ± ")
