"""A function of many jobs on several cores, of which nothing is left behind when a process is ended."""
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread

from tqdm import tqdm

CHUNK = 4  # jobs that a process takes at a time


def in_processes(function: Callable, jobs: Sequence, title: str, unit: str = "sample",
                 workers: int | None = None) -> Iterator:
    """`function` of every job, in order, on all cores or by so many `workers`. Only some results wait at any
    time. Raises ChildProcessError, an OSError, when one of the processes was killed."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs)) or 1
    block = 8 * CHUNK * workers
    try:
        with (ProcessPoolExecutor(workers, initializer=start_worker, initargs=(os.getpid(),)) as pool,
              tqdm(total=len(jobs), desc=title, unit=unit, leave=False) as progress):
            for start in range(0, len(jobs), block):
                for result in pool.map(function, jobs[start:start + block], chunksize=CHUNK):
                    progress.update()
                    yield result
    except BrokenProcessPool as error:
        raise ChildProcessError(f"{title}: one of the processes was killed: is there too little memory?"
                                ) from error


def start_worker(parent: int) -> None:
    """Ctrl-C is the parent's, its SIGTERM handler is not this process's, and torch's threads do not survive
    a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=end_with, args=(parent,), daemon=True).start()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def end_with(parent: int) -> None:
    """End this process when its parent was killed: the pool's workers would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
