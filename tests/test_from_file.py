"""sample.py --from-file: a picture for each line, resumable, shared by processes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from images import read_settings

ROOT = Path(sample.__file__).parent
LINES = ["a woman on the beach", "",
         json.dumps({"prompt": "a woman and a man", "subjects": ["man=ada.png", "bob.png"], "seed": 9}),
         json.dumps({"prompt": "a man riding a bike", "subjects": ["ada.png,bob.png"]})]


@pytest.fixture
def lines(place):
    """Write a file of prompts."""
    def write(*texts: str) -> Path:
        file = place / "prompts.jsonl"
        file.write_text("\n".join(texts), encoding="utf-8")
        return file
    return write


@pytest.fixture
def draw(world, capsys):
    """Run the command; returns what it printed."""
    def run(file, *flags) -> list[str]:
        sample.main(["--weights", str(world), "--from-file", str(file), "--output", "out", *map(str, flags)])
        return capsys.readouterr().out.splitlines()
    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image).astype(int)


def test_a_picture_for_each_line(draw, lines, world):
    out = draw(lines(*LINES), "--seed", 5)
    assert out == ["out/00000.png", "out/00001.png", "out/00002.png", "3 drawn, 0 were there"]
    sample.main(["--weights", str(world), "--prompt", "a woman and a man", "--subject", "man=ada.png",
                 "--subject", "bob.png", "--seed", "9", "--output", "alone.png"])
    assert np.abs(pixels("alone.png") - pixels("out/00001.png")).max() <= 1
    assert read_settings(Path("out/00001.png")) == read_settings(Path("alone.png"))
    assert [read_settings(Path(f"out/0000{k}.png"))["seed"] for k in range(3)] == [5, 9, 7]
    assert read_settings(Path("out/00002.png"))["subjects"] == ["man=ada.png,bob.png"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_prompts_in_any_unicode(encoding, place):
    (place / "a.txt").write_text("a woman\r\na caf\u00e9\u2028by night\n", encoding=encoding, newline="")
    assert [line.prompt for line in sample.read_lines(place / "a.txt", 0)] == [
        "a woman", "a caf\u00e9\u2028by night"]


def test_a_second_run_draws_what_is_missing_broken_or_changed(draw, lines):
    file = lines(*LINES)
    draw(file)
    assert draw(file)[-1] == "0 drawn, 3 were there"
    before = pixels("out/00001.png")
    Path("out/00000.png").unlink()
    Path("out/00001.png").write_bytes(Path("out/00001.png").read_bytes()[:-300])
    assert draw(file) == ["out/00000.png", "out/00001.png", "2 drawn, 1 were there"]
    assert np.array_equal(pixels("out/00001.png"), before)
    assert draw(lines("a man on the beach", *LINES[1:])) == ["out/00000.png", "1 drawn, 2 were there"]
    assert draw(file, "--steps", 2)[-1] == "3 drawn, 0 were there"


def test_processes_share_the_lines(draw, lines, monkeypatch):
    file = lines(*LINES)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert draw(file) == ["out/00001.png", "1 drawn, 0 were there"]
    monkeypatch.setenv("RANK", "0")
    assert draw(file) == ["out/00000.png", "out/00002.png", "2 drawn, 0 were there"]


def test_what_a_killed_process_left_is_removed(draw, lines, monkeypatch):
    """Not what another process of this run, or of a second one, may be writing, and nothing else."""
    file, out = lines(*LINES), Path("out")
    draw(file)
    old = [out / name for name in (".00000.png.7.tmp", ".00001.png.7.tmp", ".mine.png.7.tmp", ".mine.tmp")]
    new = out / ".00001.png.8.tmp"
    for path in (*old, new):
        path.touch()
    for path in old:
        os.utime(path, (0, 0))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    draw(file)
    assert set(out.glob(".*")) == {old[0], *old[2:], new}


def test_killed_in_the_middle(lines, world, place):
    """No picture is lost, half written or drawn twice."""
    file = lines(*(f"{LINES[0]} {k}" for k in range(12)))
    command = [sys.executable, str(ROOT / "sample.py"), "--weights", str(world), "--from-file", str(file),
               "--output", "out", "--steps", "30"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(place.glob("out/*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in place.glob("out/0*.png")}
    assert 0 < len(there) < 12
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert done[-1] == f"{12 - len(there)} drawn, {len(there)} were there"
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert len([path for path in os.listdir("out") if path.endswith(".png")]) == 12


@pytest.mark.parametrize(("texts", "flags", "words"), [
    (["", "  "], [], "is empty: give it a prompt"),
    (["a woman", '{"prompt": '], [], "line 2: Expecting value"),
    (["a woman", "", '{"seed": 1}'], [], "line 3: an object with prompt and, if you like, subjects, seed is"),
    (['{"prompt": "a man", "seed": -1}'], [], "line 1: seed must be in 0.."),
    (['{"prompt": "a man", "subjects": "ada.png"}'], [], "line 1: 'subjects' must be a list"),
    (["a man", '{"prompt": "a man", "subjects": ["missing.png"]}'], [],
     "line 2: missing.png does not exist (paths start at the current folder)"),
    (["a man", '{"prompt": "the beach", "subjects": ["ada.png"]}'], [], "line 2: subject ada.png: nobody"),
    (["a man"], ["--subject", "ada.png"], "--from-file goes without --subject"),
    (["a man"], ["--from-file", "missing.txt"], "No such file"),
    (["a man"], ["--steps", "0"], "--steps must be in 1..999")], ids=lambda value: str(value)[:40])
def test_refuses_before_the_first_picture(draw, lines, place, capsys, texts, flags, words):
    with pytest.raises(SystemExit) as stopped:
        draw(lines(*texts), *flags)
    _, err = capsys.readouterr()
    assert stopped.value.code == 2 and not Path("out").exists()
    assert words in err and len(err.splitlines()) == 1 and len(err) < 600
