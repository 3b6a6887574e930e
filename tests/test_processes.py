"""Runs in several processes that die, hang, are started again and resumed."""
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import distributed
from tests.stress import kill
from tests.test_train import assert_same_run

KILLS = 1
STEPS = 6 + 3 * KILLS  # as kill.py takes them
ENDED = "error: another process of this run has ended, its own message or torchrun's says why"


def test_a_process_whose_share_did_not_reach_a_parameter(monkeypatch):
    """Adds zeros to the mean: nothing of its share had a subject for an image encoder that is trained."""
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    used.grad = torch.ones(2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda message: message.add_(torch.tensor([1., 1, 4, 4, 4, 0])))
    assert distributed.average_gradients([used, unused], False) is False
    assert used.grad.tolist() == [1, 1] and unused.grad.tolist() == [2, 2, 2]


@pytest.fixture(scope="module")
def stressed(tmp_path_factory) -> Path:
    """What kill.py leaves: base, world, the undisturbed run in whole/ and the other in killed/."""
    folder = tmp_path_factory.mktemp("stress") / "new"
    script = Path(kill.__file__)
    done = subprocess.run([sys.executable, str(script), "--kills", str(KILLS), "--seed", "3", "--cache",
                           "--output", str(folder)], capture_output=True, text=True, timeout=900, check=False)
    (folder / "table.txt").write_text(f"{done.returncode}\n{done.stdout}\n{done.stderr}")
    return folder


def test_killed_and_resumed_is_the_same_run(stressed):
    """Data from toyworld through data.build --check; a cache, torchrun, kill -9, --resume."""
    lines = (stressed / "table.txt").read_text().splitlines()
    assert lines[0] == "0", lines
    assert lines[1].split()[:2] == ["kill", "what"]
    assert lines[2][2:].strip().startswith("a checkpoint")
    assert lines[3] == "1 kills: weights, averages, optimizer states and logs are equal bit for bit"


def wait_for_text(folder: Path, text: str, seconds: float) -> None:
    """Until the log holds a text."""
    end = time.monotonic() + seconds
    while text not in (log := (folder / "log.txt").read_text(errors="replace")):
        assert time.monotonic() < end, log[-3000:]
        time.sleep(0.05)


def test_a_run_whose_process_dies_is_started_again(stressed):
    """And goes on to the same weights. The other process says why it ended."""
    run = stressed / "restarted" / "run"
    torchrun = kill.start(stressed, "restarted", STEPS, "--cache", "cache", "--resume",
                          torchrun=("--max-restarts", 1))
    kill.wait_until(lambda: kill.steps_logged(run) >= 5, "step 5")
    kill.kill([kill.find_workers(torchrun)[1]])
    wait_for_text(run.parent, ENDED, 60)
    assert torchrun.wait(300) == 0
    assert_same_run(run, stressed / "whole" / "run")


DRIVER = """
import sys
from datetime import timedelta
sys.path.insert(0, {root!r})
import pytest
import train; from training import distributed
from tests.test_train import shrink
shrink(pytest.MonkeyPatch())
distributed.PATIENCE = timedelta(seconds=8)
train.main()
"""


@pytest.fixture
def start(stressed, tmp_path):
    """Start a run of 200 steps in two processes that wait 8 seconds for each other."""
    started = []

    def start(name: str) -> subprocess.Popen:
        program = tmp_path / "driver.py"
        program.write_text(DRIVER.format(root=str(kill.ROOT)))
        # A checkpoint's sheet may take longer than the others' patience, which is short here.
        started.append(kill.start(stressed, name, 200, "--checkpoint-every", 1000, program=program))
        return started[0]

    yield start
    workers = kill.find_workers(started[0])
    kill.kill([*([started[0].pid] if started[0].poll() is None else []), *workers.values()])
    started[0].wait()


def test_a_process_that_hangs_ends_the_job(stressed, start):
    place = stressed / "hanging"
    torchrun = start(place.name)
    kill.wait_until(lambda: kill.steps_logged(place / "run") >= 1, "the first step")
    stopped = kill.find_workers(torchrun)[1]
    os.kill(stopped, signal.SIGSTOP)
    wait_for_text(place, "error: another process of this run did not answer for 0:00:08", 120)
    os.kill(stopped, signal.SIGCONT)  # torchrun would wait for it for another 30 seconds
    assert torchrun.wait(60) != 0


def test_processes_meet_again_after_a_restart():
    """In a store that still holds what dead processes wrote, one of them only half of it."""
    store, names = dist.HashStore(), set()
    store.set("hello 1", "of a dead process")
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(lambda rank: distributed.meet(store, rank, 3), range(3)))
        assert len(found) == 1
        names |= found
    assert len(names) == 2
