"""bench/generalization.py: who and what is new in each group, what covers people, and the command."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

from ablate import has_unseen_pair
from bench import generalization
import toyworld
from train import make_config


@pytest.mark.parametrize("group", generalization.GROUPS)
def test_cases_are_of_their_group(group):
    shown, new_scene, unseen = generalization.GROUPS[group]
    scenes = [generalization.cast(group, number) for number in range(30)]
    for number, scene in enumerate(scenes):
        assert len(scene.subjects) == 1 + number % 2
        assert ((scene.activity, scene.context) in toyworld.HELD_OUT) == new_scene
        for subject in scene.subjects:
            assert toyworld.identity_split(subject.identity) == ("train" if shown else "test")
            assert has_unseen_pair(subject.identity) == unseen
    assert scenes == [generalization.cast(group, number) for number in range(30)]


def test_no_two_cases_share_scene_or_people():
    scenes = [generalization.cast(group, number) for group in generalization.GROUPS for number in range(9)]
    assert len({scene.seed for scene in scenes}) == len(scenes)
    people = [subject.identity for scene in scenes for subject in scene.subjects]
    assert len(set(people)) == len(people)


def test_people_of_training_are_in_its_pictures(monkeypatch):
    """Few of those that it could have drawn are."""
    assert make_config("toyworld", "moa").samples == generalization.SHOWN
    monkeypatch.setattr(generalization, "SHOWN", 200)
    shown = {subject.identity for seed in range(200) for subject in toyworld.sample_scene(seed).subjects}
    group = next(iter(generalization.GROUPS))
    for number in range(20):
        assert {subject.identity for subject in generalization.cast(group, number).subjects} <= shown


def test_people_of_one_picture_count_once():
    values = [("a", 1.0), ("a", 0.0), *((k, 1.0) for k in range(9))]
    found = generalization.by_picture(values)
    assert found["n"] == 10 and found["mean"] == pytest.approx(0.95)
    found = generalization.by_picture([("a", True), ("a", True), *((k, True) for k in range(9))])
    assert found["n"] == 10 and 0.7 < found["low"] < 0.75 and found["high"] == 1


def people(activity: str, count: int) -> toyworld.Scene:
    rng = np.random.default_rng(0)
    several = [toyworld.sample_identity(rng) for _ in range(count)]
    return toyworld.compose_scene(3, several, activity, "in Paris")


def test_the_covered_share_is_that_of_what_stands_in_front():
    assert generalization.covered(people("waving", 1)) == [0]
    assert 0.1 < generalization.covered(people("drinking boba", 1))[0] < 0.4
    # Of two dancers one is in front: her own things do not count as covering her.
    assert min(generalization.covered(people("dancing", 2))) == 0
    scene = people("reading a book", 2)
    _, visible = toyworld.render_scene(scene)
    alone = generalization.render_silhouettes(scene, lambda label: label == 1)[0]
    assert (visible[0] <= alone).all() and alone.sum() > visible[0].sum()
    assert (toyworld.render_scene(scene)[1] == visible).all()  # the renderer is as before


def test_the_prior_is_compared_picture_by_picture():
    scenes = {group: [generalization.cast(group, number) for number in range(6)]
              for group in generalization.GROUPS}

    def reading(scene, right: bool):
        return SimpleNamespace(activity=toyworld.ACTIVITIES.index(scene.activity) - (not right))
    drawn = {group: [reading(scene, True) for scene in cases] for group, cases in scenes.items()}
    prior = {group: [reading(scene, number % 3 > 0) for number, scene in enumerate(cases)]
             for group, cases in scenes.items()}
    for name, n in (("known scenes", 18), ("new scenes", 12)):
        row = generalization.by_scene(scenes, drawn, prior)[name]
        assert [row[column]["n"] for column in row] == [n] * 3
        assert [row[column]["mean"] for column in row] == pytest.approx([1, 2 / 3, 1 / 3])
        assert 0 < row["difference"]["low"] < 1 / 3 < row["difference"]["high"] < 1
    same = generalization.by_scene(scenes, drawn, drawn)["new scenes"]["difference"]
    assert (same["low"], same["mean"], same["high"]) == (0, 0, 0)


def test_the_command(tmp_path, capsys):
    generalization.main(["--output", str(tmp_path), "--count", "2", "--steps", "2"])
    results = json.loads((tmp_path / "generalization.json").read_text())
    assert results["settings"] == {"count": 2, "steps": 2, "guidance_scale": 4.0, "prior_above": 800}
    assert results["run"]["sha256"].keys() >= {"moa", "unet", "judge"}
    assert list(results["groups"]) == list(generalization.GROUPS)
    assert all(row["identity"]["n"] == 2 for row in results["groups"].values())
    assert 5 * 2 <= sum(row["in renders"]["n"] for row in results["covered"].values()) <= 5 * 3
    assert {name: row["difference"]["n"] for name, row in results["scenes"].items()} == {
        "known scenes": 3 * 2, "new scenes": 2 * 2}
    assert len(results["pairs"]) == 6
    assert capsys.readouterr().out.count("|---") > 10


def test_a_column_that_counts_fewer_pictures_says_so():
    def score(n):
        return {"mean": 0.5, "low": 0.25, "high": 0.75, "n": n}
    row = generalization.markdown({"some": {"identity": score(96), "mixup": score(48)}}).splitlines()[-1]
    assert row == "| some | 0.500 (0.250 to 0.750) | 0.500 (0.250 to 0.750), n 48 | 96 |"
