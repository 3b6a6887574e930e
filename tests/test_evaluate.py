"""evaluate.py: its scores on cases whose answers are known, its files, and what it refuses."""
import hashlib
import json
import math
import zlib
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import toyworld
from toyworld import benchmark
from toyworld.benchmark import Case, Reading
from models.load import write_json

SIZE = 64
EMPTY = np.zeros((SIZE, SIZE), bool)
NAMES = ("context", "activity", "count", "identity", "mixup", "people_iou")
CEILING = {**{name: {"mean": 0.9} for name in NAMES},
           "attributes": {name: {"mean": 0.8} for name in toyworld.ATTRIBUTES},
           "activities": {name: {"mean": 0.7} for name in toyworld.ACTIVITIES}}
KINDS = {"attributes", "activities", "prior_activities"}
SECONDS = [{"prior": 1.0, "moa": 1.5}, {"prior": 2.0, "moa": 3.5}, {"prior": 9.0, "moa": 9.0}]


def labels_of(scene, places=(0, 1)) -> dict:
    """What a perfect classifier reads off a scene, its people standing in the given order."""
    labels = [toyworld.attribute_labels(subject.identity) for subject in scene.subjects]
    labels += labels[:1] * (2 - len(labels))
    return {name: [labels[place][name] for place in places] for name in toyworld.ATTRIBUTES}


def first_with(people: int) -> int:
    """The first case of so many people."""
    return next(n for n in range(50) if len(benchmark.case_scenes(n)[0].subjects) == people)


@pytest.fixture
def case() -> Case:
    """Two people in the left half; all three pictures black; everything read right; routers right in
    two layers at two timesteps."""
    number = first_with(2)
    scene, other = benchmark.case_scenes(number)
    people = EMPTY.copy()
    people[16:48, 8:24] = True
    reading = Reading(toyworld.ACTIVITIES.index(scene.activity), toyworld.CONTEXTS.index(scene.context), 2,
                      labels_of(scene), people)
    routing = np.zeros((2, 2, 2, 16, 16), np.float32)
    routing[..., 4:12, 2:6] = 1
    return Case(number, scene, other, np.zeros((3, SIZE, SIZE, 3), np.uint8), [reading] * 3, routing)


def score(cases, seconds=SECONDS) -> dict:
    return benchmark.scores(cases, [0.9], seconds, CEILING)


def test_the_cases_are_the_same_everywhere():
    """Numbers of other versions of numpy, or of the world's plans of a scene, would be of other cases."""
    text = "\n".join(f"{scene.caption} {[astuple(subject.identity) for subject in scene.subjects]}"
                     for number in range(512) for scene in benchmark.case_scenes(number))
    assert zlib.crc32(text.encode()) == 0x2ce92107


def test_context_activity_and_count(case):
    for right, field in ((benchmark.context_right, "context"), (benchmark.activity_right, "activity"),
                         (benchmark.count_right, "count")):
        assert right(case.scene, case.readings[1])
        other = replace(case.readings[1], **{field: getattr(case.readings[1], field) - 1})
        assert not right(case.scene, other)


def test_identity_and_mixup(case):
    assert benchmark.identity(case.scene, case.readings[1]) == 1
    assert benchmark.mixup(case.scene, case.readings[1]) == 0
    swapped = replace(case.readings[1], attributes=labels_of(case.scene, (1, 0)))
    assert benchmark.mixup(case.scene, swapped) == 1
    alone = benchmark.case_scenes(first_with(1))[0]
    assert math.isnan(benchmark.mixup(alone, case.readings[1]))
    twins = replace(case.scene, subjects=(case.scene.subjects[0],) * 2)
    assert math.isnan(benchmark.mixup(twins, case.readings[1]))


def test_identity_is_the_share_of_visible_attributes(case):
    visible = case.scene.subjects[1].visible
    labels = labels_of(case.scene)
    labels[visible[0]][1] += 1
    found = replace(case.readings[1], attributes=labels)
    total = sum(len(subject.visible) for subject in case.scene.subjects)
    assert benchmark.identity(case.scene, found) == pytest.approx(1 - 1 / total)
    assert [hit[:2] for hit in benchmark.attribute_hits(case.scene, found) if not hit[2]] == [(1, visible[0])]


def test_background_change_is_that_outside_over_that_inside(case):
    case.pictures[2][16:48, 8:24] = 100
    assert benchmark.background_change(case) == 0
    case.pictures[2][:] = 100
    assert benchmark.background_change(case) == pytest.approx(1)
    case.readings[1] = case.readings[2] = replace(case.readings[1], people=EMPTY)
    assert math.isnan(benchmark.background_change(case))


def test_prior_agreement(case):
    assert benchmark.prior_agreement(case) == 1
    case.readings[0] = replace(case.readings[0], people=np.roll(case.readings[0].people, 8, axis=1))
    assert benchmark.prior_agreement(case) == pytest.approx(1 / 3)


def test_router_iou_and_gap(case):
    assert benchmark.router_iou(case) == 1
    assert benchmark.router_gap(case) == 1
    case.routing[:] = np.roll(case.routing, 8, axis=-1)
    assert benchmark.router_iou(case) == 0
    assert benchmark.router_gap(case) == pytest.approx(-32 / 224)
    case.routing[:] = 0.5
    assert benchmark.router_iou(case) == benchmark.router_gap(case) == 0


def test_router_arrays_are_per_kind_layer_and_timestep(case):
    """Self-attention: right in layer 0, 0.2 everywhere in layer 1 but 0.4 on people at the second timestep.
    Cross-attention: all in the background."""
    case.routing[0, 1] = 0.2
    case.routing[0, 1, 1, 4:12, 2:6] = 0.4
    case.routing[1] = 1 - case.routing[1]
    found = benchmark.router_arrays([case, case], [500, 100])
    assert found["kinds"] == ["self", "cross"]
    assert found["layers"] == [0, 1]
    assert found["timesteps"] == [500, 100]
    grid = {name: np.array(value["mean"]) for name, value in found["grid"].items()}
    assert grid["people"].tolist() == [[[1, 1], [0.2, 0.4]], [[0, 0], [0, 0]]]
    assert grid["background"].tolist() == [[[0, 0], [0.2, 0.2]], [[1, 1], [1, 1]]]
    assert grid["gap"].tolist() == [[[1, 1], [0, 0.2]], [[-1, -1], [-1, -1]]]
    assert grid["iou"].tolist() == [[[1, 1], [0, 1]], [[0, 0], [0, 0]]]
    layers, steps = found["per_layer"], found["per_timestep"]
    assert layers["gap"]["mean"] == [[1, 0.1], [-1, -1]]
    assert layers["iou"]["mean"] == [[1, 0.5], [0, 0]]
    assert steps["gap"]["mean"] == [-0.25, -0.2]
    assert steps["people"]["mean"] == pytest.approx([0.3, 0.35])
    assert steps["iou"]["mean"] == [0.25, 0.5]
    assert layers["gap"]["low"] is layers["gap"]["high"] is None and layers["gap"]["n"] == 2
    many = benchmark.router_arrays([case] * benchmark.FEWEST, [500, 100])["per_layer"]["gap"]
    assert many["low"] == many["high"] == many["mean"]
    assert np.mean(steps["gap"]["mean"]) == pytest.approx(benchmark.router_gap(case), abs=1e-4)


def test_the_collector_keeps_what_the_prompt_got_and_only_where_moa_drew():
    """Of a guided batch the second half is the prompt's; layers of other sizes come to one grid."""
    routing, maps = {}, []
    collect = benchmark.keep_maps(routing, maps)
    x0 = torch.zeros(2, 4, 4, 4)
    collect(1, 2, 900, x0)
    assert not maps
    for layer, pixels in enumerate((16, 4)):
        for k, kind in enumerate(benchmark.KINDS):
            weight = torch.full((4, pixels), 0.9)  # the first half: without the prompt
            weight[2:] = 0.1 + 0.2 * layer + 0.4 * k
            routing[layer, kind] = torch.stack([1 - weight, weight], -1)
    routing[0, "self"][2, 0, 1] = 0.8
    collect(2, 2, 400, x0)
    assert not routing
    (found,) = maps
    assert found.shape == (2, 2, 2, 4, 4)
    assert found[1].mean((-1, -2)) == pytest.approx(np.array([[0.1, 0.3], [0.5, 0.7]]))
    assert found[0, 0, 0, 0, 0] == pytest.approx(0.8)


@pytest.mark.parametrize(("spread", "ratio"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_variety_compares_the_spread_over_seeds(spread, ratio, monkeypatch):
    class Fake:
        def generate(self, prompts, seeds, people, prior_only, **options):
            scale = 1.0 if prior_only else spread
            return torch.stack([scale * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(s))
                                for s in seeds])

    monkeypatch.setattr(benchmark, "subjects_of", lambda *args: [])
    assert benchmark.variety(Fake(), range(2), steps=2) == pytest.approx([ratio, ratio])


def test_intervals():
    known = benchmark.interval([0.0, 1.0] * 200 + [float("nan")])
    assert known["mean"] == 0.5
    assert known["n"] == 400
    assert known["high"] - known["low"] == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)
    assert benchmark.interval([float("nan")]) == {"mean": None, "low": None, "high": None, "n": 0}
    few = benchmark.interval(np.arange(benchmark.FEWEST - 1))
    assert few == {"mean": 3.0, "low": None, "high": None, "n": 7}


@pytest.mark.parametrize(("right", "n", "low", "high"), [  # Newcombe 1998, table I; Wilson's score method
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_intervals_of_shares(right, n, low, high):
    """Where all are right, too, the interval has a length."""
    found = benchmark.interval([True] * right + [False] * (n - right))
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-4)
    found = benchmark.interval(np.arange(n) >= right)
    assert (found["low"], found["high"]) == pytest.approx((1 - high, 1 - low), abs=1e-4)
    assert found["low"] >= 0 and found["high"] <= 1


def test_scores_have_the_classifiers_own_beside_them(case):
    found = score([case, case])
    assert {*benchmark.SCORES, *KINDS, "cases"} == set(found)
    assert found["cases"]["identity"] == [1, 1] and found["cases"]["locality"] == [None, None]
    assert found["identity"] == {"mean": 1, "low": None, "high": None, "n": 2, "judge": 0.9}
    assert score([case] * 8)["identity"] == {"mean": 1, "low": 1, "high": 1, "n": 8, "judge": 0.9}
    assert 0.6 < score([case] * 8)["context"]["low"] < 0.7  # a yes or no
    assert found["attributes"]["skin"]["judge"] == 0.8
    assert "judge" not in found["variety"] and "judge" not in found["seconds_moa"]


def test_each_activity_has_its_own_share_of_pictures(case):
    asked, other = case.scene.activity, next(a for a in toyworld.ACTIVITIES if a != case.scene.activity)
    right = case.readings[1]
    wrong = replace(right, activity=toyworld.ACTIVITIES.index(other))
    found = score([replace(case, readings=[wrong, right, right])] * 2 + [replace(case, readings=[wrong] * 3)])
    assert found["activities"][asked] == {"mean": pytest.approx(2 / 3), "low": None, "high": None, "n": 3,
                                          "judge": 0.7}
    assert found["prior_activities"][asked]["mean"] == 0
    assert found["activities"][other]["mean"] is None and found["activities"][other]["n"] == 0


def test_the_table_shows_every_score(case):
    table = evaluate.markdown(score([case] * 8))
    for name in (*map(evaluate.label, benchmark.SCORES),
                 *(f"identity: {name}" for name in toyworld.ATTRIBUTES),
                 *(f"activity: {name}" for name in toyworld.ACTIVITIES)):
        assert f"| {name} |" in table
    assert "| identity mix-up | low | 0.000 | 0.000 to 0.000 | 8 | 0.900 |" in table
    assert "| background change | low | - | - | 0 | 0.900 |" in table
    assert "| variety | near 1 | 0.900 | - | 1 |  |" in table
    assert "| seconds_ratio | low | 1.500 |" in table
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {7}


def test_the_worst_are_chosen_by_their_numbers(case, monkeypatch):
    identities = [0.5, 0.2, 0.9, 0.2, 0.7]
    localities = [0.1, float("nan"), 0.4, 0.3, 0.2]
    counted = [replace(case.readings[1], count=n) for n in range(5)]
    cases = [replace(case, number=n, readings=[reading] * 3) for n, reading in enumerate(counted)]
    monkeypatch.setattr(evaluate, "SHOWN", 3)
    monkeypatch.setattr(evaluate, "background_change", lambda c: localities[c.number])
    monkeypatch.setattr(evaluate, "identity", lambda scene, reading: identities[reading.count])
    chosen = {name: [c.number for c in found] for name, found in evaluate.worst(cases).items()}
    assert chosen == {"identity": [1, 3, 0], "locality": [2, 3, 4]}
    assert evaluate.summary(cases[1])["locality"] is None


def test_sheets_of_cases_without_people(case, tmp_path, capsys):
    """Weights that draw nobody are evaluated, too."""
    stale = [tmp_path / f"{name}.png" for name in ("worst_locality", "worst_locality_routing", "router")]
    for file in stale:
        file.touch()
    case.readings[:] = [replace(case.readings[1], people=EMPTY)] * 3
    router = benchmark.router_arrays([case, case], [500, 100])
    evaluate.save_sheets([case, case], router, tmp_path)
    assert (tmp_path / "cases.png").exists()
    assert not any(file.exists() for file in stale)
    assert "router.png was not drawn: the classifier sees no people" in capsys.readouterr().err
    assert score([case, case])["locality"]["n"] == 0


def test_a_picture_of_nan_is_an_error(monkeypatch):
    class Broken:
        def generate(self, prompts, seeds, people, **options):
            return torch.full((len(prompts), 3, 8, 8), float("nan"))

    monkeypatch.setattr(benchmark, "subjects_of", lambda *args: [])
    with pytest.raises(ValueError, match="NaN"):
        benchmark.draw_cases(Broken(), None, [0, 1])


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """The files of a small evaluation of the shipped weights."""
    folder = tmp_path_factory.mktemp("evaluation") / "new" / "folder"
    evaluate.main(["--output", str(folder), "--count", "2", "--steps", "3"])
    return folder


def test_results_hold_scores_and_where_they_come_from(output):
    results = json.loads((output / "results.json").read_text())
    for name in ("identity", "context", "locality", "mixup", "router_iou", "variety", "prior_agreement"):
        assert {"mean", "low", "high", "n"} <= results[name].keys()
    assert {*benchmark.SCORES, *KINDS, "cases", "judge", "router", "worst", "run",
            "settings"} == results.keys()
    assert results["cases"]["number"] == [0, 1]
    for name in ("identity", "locality", "prior_activity", "router_iou"):
        values = [value for value in results["cases"][name] if value is not None]
        assert np.mean(values) == pytest.approx(results[name]["mean"], abs=1e-4)
    run = results["run"]
    weights = evaluate.SHIPPED / "moa.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest().startswith(run["sha256"]["moa"])
    assert run["sha256"].keys() == {"unet", "vae", "text_encoder", "image_encoder", "moa", "judge"}
    assert run["torch"] == torch.__version__
    assert run["threads"] == torch.get_num_threads()
    assert run["code"] and run["device"] and run["seconds"] > 0
    assert results["settings"] == {
        "count": 2, "first": 0, "steps": 3, "guidance_scale": 4.0, "prior_above": 800, "sparse": 0.0,
        "reuse": False, "sampler": "unipc", "start": 1000, "weights": "toyworld", "moa": "moa.safetensors"}
    router = results["router"]
    assert router["timesteps"] == [666, 333]
    assert np.shape(router["grid"]["people"]["mean"]) == (2, 16, 2)
    assert np.shape(router["per_layer"]["iou"]["mean"]) == (2, 16)
    assert np.mean(router["per_timestep"]["gap"]["mean"]) == pytest.approx(
        results["router_gap"]["mean"], abs=1e-3)
    assert [len(found) for found in results["worst"].values()] == [2, 2]
    assert (output / "results.md").read_text().startswith("| score |")


@pytest.mark.parametrize(("flags", "said"), [
    (["--count", "0"], "--count must be at least 1"), (["--steps", "1"], "nothing is left to MoA"),
    (["--moa", "nowhere.safetensors"], "nowhere.safetensors not found"),
    (["--moa", str(evaluate.SHIPPED / "unet.safetensors")], "is not a MoA file"),
    (["--classifier", str(evaluate.SHIPPED / "moa.safetensors")], "moa.safetensors does not fit"),
    (["--weights", "other"], "is not of the small world")])
def test_refusals(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    write_json({"world": "photos"}, tmp_path / "other" / "config.json")
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--output", "out", *flags])
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
