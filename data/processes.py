"""A function of many jobs on several cores, of which nothing is left behind when a process is ended."""
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from threading import Thread

from tqdm import tqdm

CHUNK = 4  # jobs whose results a process sends at a time


def in_processes(function: Callable, jobs: Sequence, title: str, unit: str = "sample",
                 workers: int | None = None, shown: bool = True) -> Iterator:
    """`function` of every job, in order, on all cores or by so many `workers`; how far it is may be `shown`.
    Only some results wait at any time. Raises what `function` raises, and ChildProcessError, an OSError,
    when one of the processes was killed."""
    chunks = [jobs[start:start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    workers = min(workers or len(os.sched_getaffinity(0)), len(chunks))
    with (tqdm(total=len(jobs), desc=title, unit=unit, leave=False, disable=not shown) as progress,
          ExitStack() as started):
        pipes = [started.enter_context(worker(function, chunks[first::workers])) for first in range(workers)]
        for number in range(len(chunks)):
            try:
                results, error, trace = pipes[number % workers].recv()
            except (EOFError, OSError) as end:
                raise ChildProcessError(f"{title}: one of the processes was killed: is there too little "
                                        "memory?") from end
            if error is not None:
                raise error from RuntimeError(f"in another process:\n{trace}")
            for result in results:
                progress.update()
                yield result


@contextmanager
def worker(function: Callable, chunks: Sequence[Sequence]) -> Iterator[Connection]:
    """A process that sends the results of chunk after chunk, and ends with the block.

    Each has a pipe of its own: the standard library's pools share one, and wait for ever when a process is
    killed in the middle of a result.
    """
    receiver, sender = Pipe(duplex=False)
    process = Process(target=work, args=(function, chunks, sender, os.getpid()), daemon=True)
    process.start()
    sender.close()  # so that the process's end is the end of what comes
    try:
        yield receiver
    finally:
        receiver.close()
        process.terminate()
        process.join()


def work(function: Callable, chunks: Sequence[Sequence], sender: Connection, parent: int) -> None:
    """What a worker does. Ctrl-C is the parent's, its SIGTERM handler is not this process's, and torch's
    threads do not survive a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=end_with, args=(parent,), daemon=True).start()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    for chunk in chunks:
        try:
            sender.send(([function(job) for job in chunk], None, ""))
        except Exception as error:
            sender.send((None, error, traceback.format_exc()))


def end_with(parent: int) -> None:
    """End this process when its parent was killed: a worker would wait for it for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
