"""Each benchmark runs at a tiny size and says what it says at a large one; no test asserts a time."""
import importlib
import json
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import evaluate
from bench import encoders, graph, lora, poses, sparse
from evaluate import SHIPPED

TINY = ["--size", "small", "--device", "cpu", "--repeats", "1"]
# Name -> flags, and how many rows there are.
BENCHMARKS = {
    "unet": ([*TINY, "--pixels", "32", "--variants", "channels_last"], 3 + 1 + 3 + 3),
    "vae": ([*TINY, "--pixels", "32", "--channels-last"], 6),
    "text": (TINY, 2),
    "sampling": ([*TINY, "--pixels", "32", "--steps", "2"], 4),
    "allocator": ([*TINY, "--pixels", "32", "--calls", "1", "--jobs", "unet", "training"], 2),
    "startup": (["--repeats", "1", "--cores", "1", "--only", "sample.py --help"], 1),
}


@pytest.fixture(autouse=True)
def one_thread():
    """As the numbers are measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name: str, arguments: list[str]) -> None:
    importlib.import_module(f"bench.{name}").main(arguments)


@pytest.mark.parametrize("name", ["encoders", "generalization", "lora", "sparse", "steps", "poses"])
def test_missing_weights_are_said_in_one_line(name, tmp_path, capsys):
    flag = "--controlnet" if name == "poses" else "--weights"
    with pytest.raises(SystemExit, match="2"):
        run(name, [flag, "nowhere", *(["--output", str(tmp_path)] if flag == "--weights" else [])])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "nowhere" in error


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_compares_all_sides(name, tmp_path, capsys):
    flags, count = BENCHMARKS[name]
    run(name, ["--output", str(tmp_path), *flags])
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["machine"]["torch"] == torch.__version__ and len(written["rows"]) == count
    for row in written["rows"]:
        for spread in (value for value in row.values() if isinstance(value, dict)):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == count + 2 and len({line.count("|") for line in table}) == 1


def test_the_memory_of_a_side(tmp_path, capsys):
    run("sampling", ["--output", str(tmp_path), *TINY, "--pixels", "32", "--steps", "2", "--memory", "--side",
                     "diffusers with MoA"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["gb"] > 0.1


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder where weights, data and the cache are made once."""
    return tmp_path_factory.mktemp("training")


@pytest.mark.parametrize("row", ["with a cache, all in fp32", "FastComposer"])
def test_a_training_step(row, inputs, capsys, monkeypatch):
    monkeypatch.chdir(inputs)  # where a row of its own process goes; undone afterwards
    run("training", ["--output", str(inputs), "--size", "small", "--device", "cpu", "--steps", "1", "--here",
                     "--rows", row])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["seconds"] > 0 and found["memory, GB"] > 0.1 and found["loss"] > 0
    assert (found["trained, M"] > 5) == row.startswith("FastComposer")  # the whole UNet


def test_steps_and_their_scores(tmp_path, capsys, monkeypatch):
    steps = importlib.import_module("bench.steps")
    monkeypatch.setattr(steps, "CONVERGED", 2)
    arguments = ["--output", str(tmp_path), "--count", "1", "--steps", "2", "--samplers", "ddim", "unipc-3"]
    steps.main(arguments)
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["sampler"] for row in rows] == ["ddim", "unipc-3"]
    assert rows[0]["distance"] > 0 == rows[1]["distance"] and (tmp_path / "steps.png").exists()

    class Drawn(Exception):
        pass

    monkeypatch.setattr(evaluate, "draw", Mock(side_effect=Drawn))
    steps.main(arguments)  # nothing is drawn again
    with pytest.raises(Drawn):
        steps.main([*arguments[:-1], "unipc-1"])
    others = {"guidance_scale": 3.0, "prior_above": 800}
    monkeypatch.setattr(evaluate, "fill_in", lambda args: vars(args).update(others))
    with pytest.raises(Drawn):  # by another setting of the weights
        steps.main(arguments)


@pytest.mark.parametrize(("name", "said"), [("steps", "--steps 1 of unipc-1"), ("sparse", "--steps 1")])
def test_steps_that_leave_nothing_to_moa(name, said, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(name, ["--output", str(tmp_path), "--steps", "1"])
    assert f"{said} leave nothing to MoA" in capsys.readouterr().err


def test_encoders_of_another_world_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"world": "photos"}')
    with pytest.raises(SystemExit, match="2"):
        run("encoders", ["--output", str(tmp_path / "out"), "--weights", str(tmp_path)])
    assert "is not of the small world" in capsys.readouterr().err


def test_routers_can_be_forced_to_a_share():
    from bench.unet import square
    assert (square(0.3) < 1).float().mean() == pytest.approx(0.3, abs=0.02)


# What the small world's pictures show

def numbers(table: str, rows: int) -> list[float]:
    """The last `rows` lines of a printed table, as numbers."""
    return [float(cell) for line in table.splitlines()[-rows:] for cell in line.split("|")[2:-1]]


def test_what_encoders_know(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where .cache is made
    monkeypatch.setattr(encoders, "READ_OUTS", {"linear": (0, 200), "deeper": (32, 200)})
    run("encoders", ["--output", "out", "--scenes", "150", "--cases", "8"])
    found = json.loads((tmp_path / "out" / "encoders.json").read_text())
    read, distances = found["read_outs"], np.array(found["distances"])
    assert found["people"][0] > 150 and found["people"][1] > 16
    for right in read.values():  # guessing would have a seventh and a fifth
        assert right["hair_color"] > 0.4 and right["bottom_color"] > 0.6
    assert np.allclose(distances, distances.T, atol=0.1) and (distances[~np.eye(6, dtype=bool)] > 5).all()
    assert capsys.readouterr().out.count("|---") == 11 + 7


def test_lora(tmp_path, capsys):
    lora.main(["--output", str(tmp_path / "new"), "--count", "2", "--steps", "2"])
    results = json.loads((tmp_path / "new" / "lora.json").read_text())
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


def test_sparse(tmp_path):
    sparse.main(["--output", str(tmp_path), "--count", "2", "--steps", "2", "--thresholds", "0.05", "1"])
    some, none = json.loads((tmp_path / "sparse.json").read_text())["rows"].values()
    assert 0.1 < some["share"] < 1 and none["share"] == none["share_largest"] == 0
    assert some["psnr"] >= some["psnr_lowest"] > none["psnr"] > 5


def test_a_step_as_a_graph(tmp_path, monkeypatch, capsys):
    """A CPU has no graphs, and is told so; where there is one, a row for each batch size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--output", str(tmp_path), "--batch-sizes", "2", "3", "--samples", "4", "--repeats", "2"]
    with pytest.raises(SystemExit, match="2"):
        run("graph", flags)
    assert "a CUDA graph is for a CUDA GPU, this is cpu" in capsys.readouterr().err
    monkeypatch.setattr("training.RecordedStep", lambda stage: partial(graph.backward, stage))
    rows = graph.measure(graph.parse_args(flags), torch.device("cpu"))
    assert [(row["pictures"], row["side"]) for row in rows] == [
        (2, "eager"), (2, "graph"), (3, "eager"), (3, "graph")]
    assert all(row["seconds"] > 0 and row["ratio"]["low"] > 0 for row in rows)
