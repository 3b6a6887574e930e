"""The tests notice bugs that others have had: stress/mutants.py's, each seeded in a copy of the tree."""
import pytest

from tests.stress.mutants import MUTANTS, catch, copy_tree


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("mutants") / "copy")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_seeded_bug_is_caught(name, copy):
    assert catch(copy, *MUTANTS[name])


def test_a_change_that_is_no_bug_is_not_caught(copy):
    """So a bug that no test notices would fail above."""
    file, old, _, test = MUTANTS["the object loss of the other sign"]
    assert not catch(copy, file, old, f"({old})", test)
