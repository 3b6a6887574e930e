"""The tests notice bugs that others have had: stress/mutants.py's, each seeded in a copy of the tree."""
import subprocess
import sys

from tests.stress import mutants


def test_seeded_bugs_are_caught():
    done = subprocess.run([sys.executable, mutants.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{len(mutants.MUTANTS)} bugs, 0 not caught\n")
