"""ablate.py: each row is another method, in training and in drawing, and is trained and measured."""
import json
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ablate
import evaluate
import moa.install
import moa.prompt
import training.moa
import training.stage
import train
from conftest import small_models
import toyworld
from moa import MultimodalPrompt, PromptConfig, load_moa, moa_layers, record_routing, save_moa

T = torch.tensor([300, 700])


@pytest.fixture
def built(tmp_path):
    """Build a row's UNet as training does, change its routers, and load it again as drawing does.

    Returns both UNets; `build.state` is the base model's state."""
    def build(name: str):
        with ExitStack() as stack:
            for edit in ablate.edits_of(ablate.ROWS[name]):
                stack.enter_context(edit())
            torch.manual_seed(0)
            base = small_models()["unet"]
            state = {k: v.clone() for k, v in base.state_dict().items()}
            unet, prompt = training.moa.add_moa(base), MultimodalPrompt(PromptConfig(16, 16, 32, 16))
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
        return (moa.install.add_moa, training.moa.add_moa, training.moa.router_loss,
                moa.prompt.PositionalEncoding.forward, training.stage.batch_indices)
    before = methods()
    for name, row in ablate.ROWS.items():
        built(name)
        for edit in row.edits:
            with pytest.raises(KeyError), edit():
                assert methods() != before, name
                raise KeyError
    assert methods() == before


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("router", [lambda: ablate.router_width(8), lambda: ablate.deeper_routers(8)])
def test_edits_add_up(order, router):
    with ExitStack() as stack:
        for edit in (router, *ablate.ROWS["cross-only"].edits)[::order]:
            stack.enter_context(edit())
        unet = training.moa.add_moa(small_models()["unet"])
    assert {layer.router.f[0].out_features for _, _, layer in moa_layers(unet)} == {8}
    for key, weights in routing_of(unet).items():
        assert (weights[..., 1].max() < 1e-6) == (key.kind == "self")


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
    everything = training.stage.batch_indices(0, 0, 300, 300)
    with ablate.without_unseen_pairs():
        seeds = np.concatenate([training.stage.batch_indices(0, step, 50, 300) for step in range(4)])
    assert set(seeds) < set(everything) and len(set(seeds)) == 200
    people = [[subject.identity for subject in toyworld.sample_scene(seed).subjects] for seed in range(300)]
    unseen = [seed for seed, several in enumerate(people) if any(map(ablate.has_unseen_pair, several))]
    assert 20 < len(unseen) < 100 and not set(unseen) & set(seeds)
    for pair in ablate.UNSEEN:  # each attribute alone is there
        for name, value in pair:
            assert any(getattr(person, name) == value for seed in seeds for person in people[seed])


def test_the_mean_of_the_router_loss():
    routing, mask = torch.rand(3, 8, 8), (torch.rand(3, 8, 8) > 0.5).float()
    whole = training.moa.router_loss(routing, mask)
    with ablate.mean_router_loss():
        assert torch.allclose(training.moa.router_loss(routing, mask), whole / 64)


def test_a_gpu_trains_rows_as_a_cpu_does(tmp_path, monkeypatch):
    """As a graph, which is faster, and in fp32."""
    seen, mixed = [], SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(bf16=True))

    def main() -> None:
        with training.Stage.autocast(mixed):
            seen.append(("--graph" in sys.argv, torch.is_autocast_enabled("cpu"),
                         torch.backends.cudnn.allow_tf32))

    monkeypatch.setattr(train, "main", main)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with pytest.raises(SystemExit):  # no weights came of it
            ablate.main(["half", "--output", str(tmp_path)])
    assert seen == [(True, False, False), (False, True, torch.backends.cudnn.allow_tf32)]
    # Drawing, too, whether it was trained just now or before.
    (ablate.place(tmp_path, "half", 0) / "moa.safetensors").touch()
    monkeypatch.setattr(evaluate, "main", lambda flags: seen.append(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ablate.main(["half", "--output", str(tmp_path)])
    assert seen[2:] == [False]
    assert torch.backends.cudnn.allow_tf32  # torch's default


def test_settings_of_rows():
    for name, row in ablate.ROWS.items():
        with ablate.preset(row.config):
            config = train.make_config("toyworld", "moa")
        changed = {"steps": ablate.STEPS, "batch_size": ablate.BATCH_SIZE, **row.config}
        assert {key: getattr(config, key) for key in changed} == changed, name
    assert train.make_config("toyworld", "moa").steps == 3250
    with ablate.preset({"batch_size": 12}):
        assert train.make_config("toyworld", "moa").batch_size == 12
    assert all(row.trained_by is None or row.trained_by in ablate.ROWS for row in ablate.ROWS.values())


@pytest.mark.parametrize("arguments, said", [
    (["one-branch-600", "--seed", "3"], "run the row one-branch first"),
    (["--table"], "there is no result"), (["--all", "--seed", "1"], "--seed is a row's"),
    (["moa", "--jobs", "0"], "--jobs must be at least 1"),
    (["moa", "--output", __file__], "is a file: give a folder's name")])
def test_refusals(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        ablate.main(["--output", str(tmp_path), *arguments])
    assert said in capsys.readouterr().err


def test_rows_are_trained_measured_and_not_done_twice(tmp_path, monkeypatch, capsys):
    """A row and one that shares its weights, then the table; then the row is another one."""
    monkeypatch.setattr(ablate, "CASES", 2)
    monkeypatch.setattr(training.moa.MoAStage, "sheet", lambda stage, path: None)  # it is slow
    small = {"samples": 16, "steps": 2, "batch_size": 4}
    rows = {"one-branch": ablate.Row("a", small, ablate.FINETUNED["edits"],
                                     {"prior-above": 1000, "steps": 4}),
            "one-branch-600": ablate.Row("b", trained_by="one-branch",
                                         evaluation={"prior-above": 1000, "start": 600, "steps": 4})}
    monkeypatch.setattr(ablate, "ROWS", rows)
    for name in rows:
        ablate.main([name, "--seed", "3", "--output", str(tmp_path)])
    folders = [tmp_path / name / "seed-3" for name in rows]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [r["settings"]["start"] for r in results] == [1000, 600]
    assert results[0]["settings"]["prior_above"] == 1000
    assert results[0]["run"]["sha256"]["moa"] == results[1]["run"]["sha256"]["moa"]
    assert np.allclose(results[0]["router"]["grid"]["people"]["mean"], 1)  # all personalized
    recorded = json.loads((folders[0] / "config.json").read_text())["training"]
    assert (recorded["seed"], recorded["steps"], recorded["lambda_router"]) == (3, 2, 3e-5)
    assert recorded["batch_size"] == 4
    capsys.readouterr()

    def again(name: str) -> str:
        stamps = [(folder / "results.json").stat().st_mtime_ns for folder in folders]
        try:
            ablate.main([name, "--seed", "3", "--output", str(tmp_path)])
        except SystemExit as end:
            assert end.code == 2
        assert stamps == [(folder / "results.json").stat().st_mtime_ns for folder in folders]
        return "".join(capsys.readouterr())

    assert "results.json is there already" in again("one-branch")
    ablate.main(["--table", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "one-branch" / "seed-3" / "results.json").read_text())
    chance = f"{result['prior_identity']['mean']:.3f}"
    assert lines[2].startswith(f"| the prior alone, nobody put in | | {chance} | - ")
    assert [line.split(":")[0] for line in lines[3:]] == ["| `one-branch`", "| `one-branch-600`"]
    assert (tmp_path / "tradeoff.png").stat().st_size > 5000

    changed = ablate.Row("a", small | {"lambda_router": 1.0}, rows["one-branch"].edits,
                         rows["one-branch"].evaluation)
    monkeypatch.setitem(rows, "one-branch", changed)
    for name in rows:  # the second's weights are the first's
        assert "seed-3 is of another version of the row one-branch, see its row.json (config)" in again(name)
    with pytest.raises(SystemExit, match="2"):
        ablate.main(["--table", "--output", str(tmp_path)])
    said = capsys.readouterr()
    for name in rows:
        assert f"{name}/seed-3/results.json is left out: the row was another (config)" in said.err
    for folder in folders:
        (folder / "row.json").unlink()
    with (folders[0] / "moa.safetensors").open("ab") as file:
        file.write(b" ")
    assert "is of other weights than" in again("one-branch-600")
    results[0]["run"]["sha256"]["moa"] = "0"  # as after another training
    (folders[0] / "results.json").write_text(json.dumps(results[0]))
    shutil.copytree(folders[0], tmp_path / "one-branch" / "seed-3-old")
    ablate.main(["--table", "--output", str(tmp_path)])
    said = capsys.readouterr()
    assert "one-branch-600/seed-3/results.json is left out: the row was another (weights)" in said.err
    assert said.out.count("| `one-branch`") == 1 and "`one-branch-600`" not in said.out


def test_a_row_is_known_by_all_that_its_edits_do():
    def edits(name: str) -> list[str]:
        return ablate.description(name)["edits"]
    assert edits("moa") == []
    assert any("def fixed_routing" in text for text in edits("one-branch-600"))
    assert any(text.startswith("def fix(") for text in edits("cross-only"))
    assert any("def has_unseen_pair" in text for text in edits("unseen-pairs"))
    assert any(text.startswith("UNSEEN = ((") for text in edits("unseen-pairs"))
    assert "DECODER = range(7, 16)" in edits("decoder-only")
    assert edits("cross-only") != edits("self-only")
    descriptions = [json.dumps(ablate.description(name)) for name in ablate.ROWS]
    assert len(set(descriptions)) == len(descriptions)


def wide(hidden: int, more=1):
    return lambda: ablate.router_width(hidden)


def test_what_an_edit_holds_is_part_of_it():
    texts = [ablate.sources(edit) for edit in (wide(32), wide(64), partial(wide, 32), partial(wide, 64))]
    assert len({tuple(text) for text in texts}) == 4
    assert "hidden = 32" in texts[0] and "(64,) {}" in texts[3] and "(1,) None" in texts[3]


def test_settings_that_a_folder_does_not_know_are_newer(tmp_path):
    described = ablate.description("half")
    for change, found in (({}, ""), ({"lambda_router": 1.0}, "config")):
        old = {key: value for key, value in described["config"].items() if key != "masked_probability"}
        ablate.keep_description(tmp_path, {**described, "config": old | change})
        assert ablate.differing(tmp_path, "half") == found


def test_a_row_that_was_changed_is_not_taken_as_done(tmp_path, monkeypatch, capsys):
    stub(tmp_path / "python", monkeypatch, "echo $2 >> $6/started")
    folder = tmp_path / "all"
    for name in ablate.ROWS:
        for seed in ablate.SEEDS:
            ablate.keep_description(ablate.place(folder, name, seed), ablate.description(name))
            (ablate.place(folder, name, seed) / "results.json").touch()
    ablate.main(["--all", "--output", str(folder)])
    assert not (folder / "started").exists()
    monkeypatch.setitem(ablate.ROWS, "half", ablate.Row("another", {"steps": 9}))
    ablate.main(["--all", "--output", str(folder)])
    assert (folder / "started").read_text().split() == ["half"] * 3


def stub(path, monkeypatch, text: str) -> None:
    """A program in Python's place, and no data to prepare."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(ablate, "prepare_data", lambda: None)


def test_rows_that_fail_are_said_at_the_end(tmp_path, monkeypatch, capsys):
    stub(tmp_path / "python", monkeypatch, "echo $2 >> $6/started; exit 3")
    with pytest.raises(SystemExit, match="1"):
        ablate.main(["--all", "--jobs", "2", "--output", str(tmp_path / "all")])
    started = (tmp_path / "all" / "started").read_text().split()
    assert sorted(started) == sorted([*ablate.ROWS] * 3)
    assert capsys.readouterr().out.count("failed, see") == len(started)


def test_sigterm_stops_the_rows_that_run(tmp_path, monkeypatch):
    """And starts no other."""
    stub(tmp_path / "python", monkeypatch, """trap 'echo stopped >> $6/log; kill $!; exit 0' TERM
        echo started >> $6/log
        sleep 60 & wait""")
    log = tmp_path / "all" / "log"

    def end() -> None:
        while not log.exists() or log.read_text().count("started") < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=end, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        ablate.main(["--all", "--jobs", "2", "--output", str(tmp_path / "all")])
    assert sorted(log.read_text().split()) == ["started"] * 2 + ["stopped"] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_score_over_seeds():
    one = {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 64}
    other = {"mean": 0.6, "low": 0.56, "high": 0.7, "n": 64}
    assert ablate.over_seeds([{"mean": None, "low": None, "high": None, "n": 0}]) == "-"
    assert ablate.over_seeds([one]) == "0.400 (0.300 to 0.500)"
    assert ablate.over_seeds([one, other]) == "0.500 (0.430 to 0.600)"
    assert ablate.over_seeds([{"mean": 0.4, "low": None, "high": None, "n": 4}]) == "0.400"
    assert ablate.over_seeds([one, {"mean": 0.5, "n": 64}]) == "0.450 (0.350 to 0.550)"
    assert ablate.over_seeds([one | {"n": 4}]) == "0.400"


def measured(values: list, numbers=(0, 1, 2, 3)) -> dict:
    """What results.json holds of one score."""
    counted = [value for value in values if value is not None]
    return {"identity": {"mean": np.mean(counted), "n": len(counted)},
            "cases": {"number": list(numbers), "identity": values}}


def test_a_broken_row_is_one_line(tmp_path, capsys):
    folder = ablate.place(tmp_path, "moa", 0)
    folder.mkdir(parents=True)
    (folder / "row.json").write_text("{")
    (folder / "results.json").write_text("{}")
    for arguments in (["--table"], ["moa"]):
        with pytest.raises(SystemExit, match="2"):
            ablate.main([*arguments, "--output", str(tmp_path)])
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "row.json is not a JSON file" in line
    (folder / "row.json").unlink()
    ablate.main(["moa", "--output", str(tmp_path)])  # a result of an older version, which names no weights
    assert "is there already" in capsys.readouterr().out


def test_how_far_a_row_is_from_the_method(monkeypatch):
    monkeypatch.setattr(ablate, "COMPARED", ("identity",))
    found = {"moa": {0: measured([0.1, 0.3, 0.5, 0.7]), 1: measured([0.2, 0.4, 0.6, 0.8])},
             "half": {0: measured([0.2, 0.5, 0.6, None]), 1: measured([0.5, 0.6, 0.9, 0.8]),
                      2: measured([0.9] * 4)},
             "double": {0: {"identity": {"mean": 0.5, "n": 4}}, 1: measured([0.5] * 4, (4, 5, 6, 7))}}
    assert ablate.shared_seeds(found, "half") == ([0, 1], [])  # seed 2 the method does not have
    assert ablate.shared_seeds(found, "double") == ([], [0])  # without cases, and of other cases
    assert ablate.difference(found, "double", "identity") == ""
    means = [[0.4, 0.5], [1.3 / 3, 0.7, 0.9], [0.5, 0.5]]
    squares = sum(np.sum((np.array(row) - np.mean(row)) ** 2) for row in means)
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
    assert ablate.difference(found, "half", "identity") == f"+0.300 ± {2 * deviation * (2 / 3) ** 0.5:.3f}"
    found["half"][2]["identity"] = {"mean": None, "n": 0}  # a score that nobody has
    found["moa"][2]["identity"]["n"] = 0
    assert ablate.difference(found, "half", "identity").startswith("+0.200 ± ")
    found["moa"][2]["identity"]["n"] = 8  # of more cases
    assert ablate.shared_seeds(found, "half") == ([0, 1], [])
    del found["half"][1], found["half"][2], found["moa"][1], found["moa"][2], found["double"][1]
    assert ablate.spread_of_seeds(found, "identity") == (0, 0)
    error = np.std([0.1, 0.2, 0.1], ddof=1) / np.sqrt(3)
    assert ablate.difference(found, "half", "identity") == f"+0.133 ± {2 * error:.3f}"  # of one seed
    assert "no row has two" in "\n".join(ablate.differences(found))
    found["no-encoding"] = {0: measured([0.1] * 4), 1: measured([0.101] * 4)}
    assert "too few yet" in "\n".join(ablate.differences(found))
    assert ablate.difference(found, "half", "identity").startswith("+0.133 ± ")
    found["no-encoding"] |= {seed: measured([0.1] * 4) for seed in range(2, 1 + ablate.ENOUGH)}
    assert ablate.difference(found, "half", "identity").startswith("**+0.133 ± ")
    assert "is bold" in "\n".join(ablate.differences(found))


def test_what_differs_beside_the_row_is_said():
    def result(device="cpu", steps=20, judge="a", moa="b") -> dict:
        return {"settings": {"steps": steps, "prior_above": 800},
                "run": {"device": device, "sha256": {"judge": judge, "moa": moa}}}
    assert ablate.mixed([result(), result(moa="c"), {"identity": {}}]) == []
    assert ablate.mixed([result(), result("A GPU")]) == ["device"]
    assert ablate.mixed([result(), result(steps=5, judge="c")]) == ["steps", "judge weights"]


def test_what_is_not_an_evaluation_is_left_out(tmp_path, capsys):
    folder = ablate.place(tmp_path, "half", 0)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"groups": {}, "run": {}}')
    assert ablate.results_of(tmp_path, "half") == {}
    assert "has no identity, so it is not evaluate.py's" in capsys.readouterr().err
