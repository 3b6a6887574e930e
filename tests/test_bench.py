"""The measurements of bench/ at tiny sizes, so that they keep up with what they measure."""
import json

import pytest

from bench import lora, poses
from evaluate import SHIPPED


def numbers(table: str, rows: int) -> list[float]:
    """The last `rows` lines of a printed table, as numbers."""
    return [float(cell) for line in table.splitlines()[-rows:] for cell in line.split("|")[2:-1]]


def test_lora(tmp_path, capsys):
    lora.main(["--output", str(tmp_path / "new"), "--count", "2", "--steps", "2"])
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert list(results) == [*lora.ROWS, "filtered scenes"]
    assert numbers(capsys.readouterr().out, 7) == pytest.approx(
        [value for row in results.values() for value in row.values()], abs=6e-4)
    assert results["the prior"] != results["the prior, scope all"]  # whose LoRA is at work
    assert results["filtered scenes"]["colours, background"] > 0.5
    assert (tmp_path / "new" / "sheet.png").stat().st_size > 1000


def test_poses(capsys):
    poses.main(["--controlnet", str(SHIPPED), "--count", "2", "--steps", "2"])
    found = numbers(capsys.readouterr().out, 9)
    assert len(found) == 9 * 3 and all(0 <= value <= 1 for value in found)
    assert min(found[:2]) > 0.5  # the judge on the renders themselves
