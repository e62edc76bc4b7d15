"""Runs of a study on one thread each, here or in several processes."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int = 1) -> Iterator[None]:
    """Compute with `count` threads (all runs of a study take one), and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def finished(run: Callable, jobs: Sequence[tuple], workers: int) -> Iterator[tuple[tuple, Future]]:
    """(job, the future of `run(*job)`) as the jobs finish: here with one worker, else in as many processes."""
    if workers == 1:
        for job in jobs:
            future = Future()
            try:
                future.set_result(run(*job))
            except Exception as error:
                future.set_exception(error)
            yield job, future
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent)
    try:
        futures = {pool.submit(run, *job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: end when the process that started it is gone, which nobody else would tell it."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
