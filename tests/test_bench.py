"""Each benchmark runs at a tiny size and says what it says at a large one; no test asserts a time."""
import importlib
import json
import os
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from bench import busy, graph, sparse

TINY = ["--size", "small", "--device", "cpu", "--repeats", "1"]
# Name -> flags, and how many rows there are.
BENCHMARKS = {
    "unet": ([*TINY, "--pixels", "32", "--variants", "channels_last"], 4 + 1 + 3 + 3),
    "sampling": ([*TINY, "--pixels", "32", "--steps", "2"], 5),
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


def test_routers_can_be_forced_to_a_share():
    from bench.unet import square
    assert (square(0.3) < 1).float().mean() == pytest.approx(0.3, abs=0.02)


def test_sparse(tmp_path):
    sparse.main(["--output", str(tmp_path), "--count", "2", "--steps", "2", "--thresholds", "0.05", "1"])
    some, none = json.loads((tmp_path / "sparse.json").read_text())["rows"].values()
    assert 0.1 < some["share"] < 1 and none["share"] == none["share_largest"] == 0
    assert some["psnr"] >= some["psnr_lowest"] > none["psnr"] > 5


def test_beside_a_loop_on_each_core(tmp_path, monkeypatch):
    """A process with one thread is the measure of all others."""
    loops = []
    monkeypatch.setattr(busy, "run", lambda launcher, command, folder, **one: 2.0 if one else 3.0)
    monkeypatch.setattr(busy, "beside", lambda count: loops.append(count) or nullcontext())
    busy.main(["--output", str(tmp_path), "--repeats", "2"])
    rows = json.loads((tmp_path / "busy.json").read_text())["rows"]
    assert loops == [0, len(os.sched_getaffinity(0))] * len(busy.CASES) == [
        row["loops beside it"] for row in rows]
    assert all(row["of the fair share's time"]["median"] == 1.5 for row in rows)


def test_a_step_as_a_graph(tmp_path, monkeypatch, capsys):
    """A CPU has no graphs, and is told so; where there is one, a row for each batch size."""
    monkeypatch.chdir(tmp_path)  # where .cache is made
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--output", str(tmp_path), "--batch-sizes", "2", "3", "--samples", "4", "--repeats", "2"]
    with pytest.raises(SystemExit, match="2"):
        run("graph", flags)
    assert "a CUDA graph is for a CUDA GPU, this is cpu" in capsys.readouterr().err
    monkeypatch.setattr(graph, "RecordedStep", lambda stage: partial(graph.backward, stage))
    rows = graph.measure(graph.parse_args(flags), torch.device("cpu"))
    assert [(row["pictures"], row["side"]) for row in rows] == [
        (2, "eager"), (2, "graph"), (3, "eager"), (3, "graph")]
    assert all(row["seconds"] > 0 and row["ratio"]["low"] > 0 for row in rows)
