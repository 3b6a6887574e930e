"""bench/generalization.py: who and what is new in each group, what covers people, and the command."""
import json

import numpy as np
import pytest

from ablate import has_unseen_pair
from bench import generalization
from data import toyworld


@pytest.mark.parametrize("group", generalization.GROUPS)
def test_cases_are_of_their_group(group):
    split, new_scene, unseen = generalization.GROUPS[group]
    scenes = [generalization.cast(number, *generalization.GROUPS[group]) for number in range(30)]
    for number, scene in enumerate(scenes):
        assert len(scene.subjects) == 1 + number % 2
        assert ((scene.activity, scene.context) in toyworld.HELD_OUT) == new_scene
        for subject in scene.subjects:
            assert toyworld.identity_split(subject.identity) == split
            assert has_unseen_pair(subject.identity) == unseen
    assert scenes == [generalization.cast(number, *generalization.GROUPS[group]) for number in range(30)]


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


def test_the_command(tmp_path, capsys):
    generalization.main(["--output", str(tmp_path), "--count", "2", "--steps", "2"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["groups"]) == list(generalization.GROUPS)
    assert all(row["identity"]["n"] == 2 for row in results["groups"].values())
    assert sum(row["in renders"]["n"] for row in results["covered"].values()) == 5 * 3
    assert len(results["pairs"]) == 6
    assert capsys.readouterr().out.count("|---") > 10
