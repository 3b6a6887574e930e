"""The scores of evaluate.py on cases whose answers are known."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import evaluate
from data import toyworld
from evaluate import Case, Reading

SIZE = 64


def labels_of(scene, places=(0, 1)) -> dict:
    """What a perfect judge reads off a scene, its people standing in the given order."""
    labels = [toyworld.attribute_labels(subject.identity) for subject in scene.subjects]
    labels += labels[:1] * (2 - len(labels))
    return {name: [labels[place][name] for place in places] for name in toyworld.ATTRIBUTES}


@pytest.fixture
def case() -> Case:
    """Two people in the left half; all three pictures black; everything read right."""
    scene, other = next(pair for n in range(50) if len((pair := evaluate.cast(n))[0].subjects) == 2)
    people = np.zeros((SIZE, SIZE), bool)
    people[16:48, 8:24] = True
    reading = Reading(toyworld.ACTIVITIES.index(scene.activity), toyworld.CONTEXTS.index(scene.context), 2,
                      labels_of(scene), people)
    routing = np.zeros((16, 16))
    routing[4:12, 2:6] = 1
    return Case(scene, other, np.zeros((2, SIZE, SIZE, 3), np.uint8), np.zeros((3, SIZE, SIZE, 3), np.uint8),
                [reading] * 3, routing)


def test_cases_are_fixed_and_held_out():
    first, second = evaluate.cast(3)
    assert [first, second] == evaluate.cast(3)
    assert first.caption == second.caption
    for scene in (first, second):
        assert all(toyworld.identity_split(s.identity) == "test" for s in scene.subjects)


def test_identity_and_mixups(case):
    assert all(right for _, right in evaluate.attribute_hits(case.scene, case.readings[1]))
    assert not any(evaluate.mixups(case.scene, case.readings[1]))
    swapped = replace(case.readings[1], attributes=labels_of(case.scene, (1, 0)))
    assert all(evaluate.mixups(case.scene, swapped))
    alone = next(pair[0] for n in range(50) if len((pair := evaluate.cast(n))[0].subjects) == 1)
    assert evaluate.mixups(alone, case.readings[1]) == []


def test_locality_is_the_change_outside_over_that_inside(case):
    case.pictures[2][16:48, 8:24] = 100
    assert evaluate.locality(case) == 0
    case.pictures[2][:] = 100
    assert evaluate.locality(case) == pytest.approx(1)
    case.readings[1] = case.readings[2] = replace(case.readings[1], people=np.zeros((SIZE, SIZE), bool))
    assert math.isnan(evaluate.locality(case))


def test_background_distance_looks_outside_only(case):
    case.pictures[1][16:48, 8:24] = 255
    assert evaluate.background_distance(case) == 0
    case.pictures[1][:] = 51
    assert evaluate.background_distance(case) == pytest.approx(0.2)


def test_overlaps(case):
    assert evaluate.router_iou(case) == 1
    assert evaluate.overlap(case) == 1
    case.readings[0] = replace(case.readings[0], people=np.roll(case.readings[0].people, 8, axis=1))
    assert evaluate.overlap(case) == pytest.approx(1 / 3)
    case.routing[:] = np.roll(case.routing, 8, axis=1)
    assert evaluate.router_iou(case) == 0


@pytest.mark.parametrize(("spread", "ratio"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_variety_compares_the_spread_over_seeds(spread, ratio, monkeypatch):
    class Fake:
        def generate(self, prompts, seeds, people, prior_only, **options):
            scale = 1.0 if prior_only else spread
            return torch.stack([scale * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(s))
                                for s in seeds])

    monkeypatch.setattr(evaluate, "subjects_of", lambda *args: [])
    assert evaluate.variety(Fake(), 2, steps=2) == pytest.approx([ratio, ratio])


def test_intervals():
    known = evaluate.interval([0.0, 1.0] * 200 + [float("nan")])
    assert known["mean"] == 0.5
    assert known["n"] == 400
    assert known["high"] - known["low"] == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)
    assert evaluate.interval([float("nan")]) == {"mean": None, "low": None, "high": None, "n": 0}


def test_the_table_shows_every_score(case):
    table = evaluate.markdown({**evaluate.scores([case, case], {"activity": 0.99}),
                               "variety": evaluate.interval([0.9])})
    for name in ("context", "identity", "locality", "mixup", "router_iou", "variety", "identity: skin"):
        assert f"| {name} |" in table
    assert "| mixup | 0.000 |" in table
