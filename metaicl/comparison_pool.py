"""Doing the runs of a comparison: one after another, or several at a time in processes of their own."""

import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread

import torch
from tqdm.auto import tqdm

from metaicl.comparison_runs import Job, Worker
from metaicl.process import is_tuned, tune_process
from metaicl.results import Result


def run_jobs(worker: Worker, jobs: Sequence[Job], *, processes: int) -> tuple[Result, ...]:
    """Every job's result, in the order of the jobs.

    Results do not depend on `processes` but through the number of threads, on which rounding depends.

    Args:
        worker: Does a job.
        jobs: What is to be done.
        processes: Runs at a time. Each process gets its share of the threads.

    Raises:
        TypeError: If there are several processes and a job cannot be sent to one.
    """
    found: dict[int, Result] = {}
    with tqdm(total=len(jobs), disable=not worker.progress, unit="run", desc="compare") as bar:
        for index, result in _finished(worker, jobs, min(processes, len(jobs))):
            found[index] = result
            bar.update()
    return tuple(found[index] for index in range(len(jobs)))


def _finished(worker: Worker, jobs: Sequence[Job], processes: int) -> Iterator[tuple[int, Result]]:
    if processes <= 1:
        yield from ((index, worker.run(job)) for index, job in enumerate(jobs))
        return
    content = _packed(replace(worker, progress=False), jobs)
    threads = max(1, torch.get_num_threads() // processes)
    context = get_context("spawn")  # a forked child inherits torch's thread pools in a state that can hang
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=(content, threads, is_tuned())) as pool:
        try:
            futures = {pool.submit(_run, index): index for index in range(len(jobs))}
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _packed(worker: Worker, jobs: Sequence[Job]) -> bytes:
    for job in jobs:
        try:
            pickle.dumps((job.entry, worker.trainer))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"learners[{job.entry.name!r}] cannot be sent to another process ({error}); "
                "use a class, functools.partial or a function defined in a file, or processes=1"
            ) from error
    return pickle.dumps((worker, tuple(jobs)))  # once for all jobs: what they share, such as images, is sent once


_shared: tuple[Worker, Sequence[Job]] | None = None  # of a child process, set once by its initializer


def _start(content: bytes, threads: int, tuned: bool) -> None:
    global _shared
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if tuned:
        tune_process()
    _shared = pickle.loads(content)  # made by the parent process a moment ago


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its children, and they would go on training."""
    parent = parent_process()
    assert parent is not None  # this runs in a child
    wait([parent.sentinel])
    os._exit(1)


def _run(index: int) -> Result:
    assert _shared is not None  # the initializer has run
    worker, jobs = _shared
    return worker.run(jobs[index])
