"""A pool of worker processes that ends with its parent, and takes tasks only as it can do them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import forkserver
from typing import Any

from megatron_mup.errors import DataError


def start_early() -> None:
    """Load what workers need while this process does something else."""
    _context()
    forkserver.ensure_running()


def _context() -> multiprocessing.context.BaseContext:
    # Not forked from this process, which may hold threads, but from a server that has loaded the
    # modules once: a worker starts in a tenth of the time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_mup.data.tokenization"])
    return context


def run_in_workers[TaskT, ResultT](
    function: Callable[[TaskT], ResultT],
    tasks: Iterable[TaskT],
    *,
    workers: int,
    prepare: Callable[..., None] | None = None,
    prepare_with: tuple[Any, ...] = (),
) -> Iterator[ResultT]:
    """Yield the results of the tasks as they come.

    Args:
        function: What a worker does with a task; importable.
        tasks: Taken only as workers become free.
        workers: Number of processes.
        prepare: Called once in each worker before its first task.
        prepare_with: Arguments of ``prepare``.

    Yields:
        The results, in the order in which they are done.

    Raises:
        DataError: A worker died.
    """
    pool = ProcessPoolExecutor(
        workers,
        mp_context=_context(),
        initializer=_start_worker,
        initargs=(prepare, prepare_with),
    )
    try:
        yield from _results(pool, function, iter(tasks), workers)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (out of memory?); run the same command again with fewer "
            f"--workers ({workers} now)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def run_in_order[TaskT, ResultT](
    function: Callable[[TaskT], ResultT], tasks: Iterable[TaskT], *, workers: int
) -> Iterator[ResultT]:
    """Yield the results as ``run_in_workers``, but in the order of the tasks.

    Args:
        function: What a worker does with a task; importable.
        tasks: Taken only as workers become free.
        workers: Number of processes.

    Yields:
        The results.

    Raises:
        DataError: A worker died.
    """
    ready: dict[int, ResultT] = {}
    wanted = 0
    numbered = partial(_numbered, function)
    for number, result in run_in_workers(numbered, enumerate(tasks), workers=workers):
        ready[number] = result
        while wanted in ready:
            yield ready.pop(wanted)
            wanted += 1


def _numbered[TaskT, ResultT](
    function: Callable[[TaskT], ResultT], numbered_task: tuple[int, TaskT]
) -> tuple[int, ResultT]:
    number, task = numbered_task
    return number, function(task)


def _results[TaskT, ResultT](
    pool: ProcessPoolExecutor,
    function: Callable[[TaskT], ResultT],
    waiting: Iterator[TaskT],
    workers: int,
) -> Iterator[ResultT]:
    running = set[Future[ResultT]]()
    while True:
        # One task more than workers, so that none of them idles.
        for task in islice(waiting, workers + 1 - len(running)):
            running.add(pool.submit(function, task))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _start_worker(prepare: Callable[..., None] | None, prepare_with: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole process group; the parent decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("not a worker process")

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    # A worker holds both ends of the queue that it reads, so that it would wait for ever.
    threading.Thread(target=end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare(*prepare_with)
