"""What is freed is used again, not fetched anew from the system."""
import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from models.device import reuse_memory

GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
FAULTS = """
import resource, sys
import torch
if sys.argv[1] == "kept":
    from models.device import reuse_memory
    reuse_memory()
def fill(pages):
    torch.ones(pages << 10)
fill(16_400)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for pages in (16_399, 16_398, 16_397, 16_396):
    fill(pages)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_pages_are_not_fetched_again():
    faults = {side: int(subprocess.run([sys.executable, "-c", FAULTS, side], cwd=Path(__file__).parents[1],
                                       check=True, capture_output=True, text=True).stdout)
              for side in ("kept", "given")}
    assert faults["kept"] < 1000 and faults["given"] > 60_000


def test_another_c_library_is_left_alone(monkeypatch):
    def absent(name):
        raise OSError
    monkeypatch.setattr(ctypes, "CDLL", absent)
    reuse_memory()
