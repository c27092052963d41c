"""Doing the runs of a comparison: one after another, or several at a time in processes of their own."""

import contextlib
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Event, Thread

import torch
from tqdm.auto import tqdm

from metaicl.comparison_runs import Job, Worker
from metaicl.interruption import Interruption, ignore_signals, interrupt
from metaicl.process import is_tuned, tune_process
from metaicl.results import Result

_SECONDS = 0.2  # between two looks at whether a signal came


def run_jobs(worker: Worker, jobs: Sequence[Job], *, processes: int) -> tuple[Result, ...]:
    """Every job's result, in the order of the jobs.

    Results do not depend on `processes` but through the number of threads, on which rounding depends. With several,
    the first Ctrl-C or SIGTERM lets every run end its update and write its checkpoint, and no further one begins; a
    second one does not wait. An error in one run stops the others in the same way.

    Args:
        worker: Does a job.
        jobs: What is to be done.
        processes: Runs at a time. Each process gets its share of the threads.

    Raises:
        TypeError: If there are several processes and a job cannot be sent to one.
        RuntimeError: If a process died.
    """
    found: dict[int, Result] = {}
    bar = tqdm(total=len(jobs), disable=not worker.progress, unit="run", desc="compare")
    with bar, contextlib.closing(_finished(worker, jobs, min(processes, len(jobs)))) as finished:
        for index, result in finished:
            found[index] = result
            bar.update()
    return tuple(found[index] for index in range(len(jobs)))


def _finished(worker: Worker, jobs: Sequence[Job], processes: int) -> Generator[tuple[int, Result], None, None]:
    if processes <= 1:
        yield from ((index, worker.run(job)) for index, job in enumerate(jobs))
        return
    content = _packed(replace(worker, progress=False), jobs)
    threads = max(1, torch.get_num_threads() // processes)
    children: list[_Child] = []
    with Interruption() as interruption:  # a pending signal takes effect at its end, when the children have ended
        try:
            indices = iter(range(len(jobs)))
            for _ in range(processes):
                children.append(_Child(content, threads))
                children[-1].give(next(indices))
            while busy := {child.pipe: child for child in children if child.index is not None}:
                ready = wait(list(busy), _SECONDS)
                if interruption.pending is not None:
                    break
                for pipe in ready:
                    yield from _answers(busy[pipe], jobs, indices)  # type: ignore[index]  # one of those waited for
        except BaseException:
            if interruption.pending is not None:  # a second signal
                for child in children:
                    child.process.kill()
            raise
        finally:
            _end(children)


def _answers(child: "_Child", jobs: Sequence[Job], indices: Iterator[int]) -> Iterator[tuple[int, Result]]:
    """The result of the child's job; the child gets its next job first."""
    assert child.index is not None  # it was busy
    index, job = child.index, jobs[child.index]
    try:
        outcome = child.pipe.recv()
    except (EOFError, OSError) as error:
        child.process.join()
        raise RuntimeError(
            f"the process that ran {job.entry.name!r} on {job.board.name!r}, seed {job.seed}, died with exit code "
            f"{child.process.exitcode} (-9 is often a lack of memory); a script that compares with several processes "
            'must do so under if __name__ == "__main__"'
        ) from error
    child.give(next(indices, None))
    if isinstance(outcome, BaseException):
        raise outcome
    yield index, outcome


def _end(children: Sequence["_Child"]) -> None:
    """Let the busy ones end their update, and wait for all; an exception that comes meanwhile does not wait."""
    try:
        for child in children:
            child.dismiss()
        for child in children:
            child.process.join()
    except BaseException:
        for child in children:
            child.process.kill()
        raise


class _Child:
    """A process that does one job after another.

    Attributes:
        process: It.
        pipe: Takes indices of jobs there and outcomes back.
        index: The job that it is at, None while it has none.
    """

    def __init__(self, content: bytes, threads: int) -> None:
        context = get_context("spawn")  # a forked child inherits torch's thread pools in a state that can hang
        self.index: int | None = None
        self.pipe, theirs = context.Pipe()
        heard, self._orders = context.Pipe(duplex=False)
        self.process = context.Process(target=_serve, args=(theirs, heard, content, threads, is_tuned()))
        self.process.start()
        theirs.close()  # so that reading here ends where the process does
        heard.close()

    def give(self, index: int | None) -> None:
        """Let it do a job, or nothing."""
        self.index = index
        if index is not None:
            with contextlib.suppress(OSError):  # it died, and reading its answer says so
                self.pipe.send(index)

    def dismiss(self) -> None:
        """Let it end: at once if it has no job, after its update if it trains."""
        if self.index is not None:
            with contextlib.suppress(OSError):
                self._orders.send_bytes(b"stop")
        self.pipe.close()


def _packed(worker: Worker, jobs: Sequence[Job]) -> bytes:
    for job in jobs:
        try:
            content = pickle.dumps((job.entry, worker.trainer))
            if b"__main__" in content and not hasattr(sys.modules["__main__"], "__file__"):
                raise TypeError("it is from a session without a file, such as a notebook's")
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"learners[{job.entry.name!r}] cannot be sent to another process ({error}); "
                "use a class, functools.partial or a function defined in a file, or processes=1"
            ) from error
    return pickle.dumps((worker, tuple(jobs)))  # once for all jobs: what they share, such as images, is sent once


def _serve(pipe: Connection, orders: Connection, content: bytes, threads: int, tuned: bool) -> None:
    """The life of a child process."""
    ignore_signals()
    stopped = Event()
    Thread(target=_obey, args=(orders, stopped), daemon=True).start()
    torch.set_num_threads(threads)
    if tuned:
        tune_process()
    loaded: tuple[Worker, Sequence[Job]] | None = None
    with contextlib.suppress(EOFError, OSError):  # the parent closed the pipe: nothing is left to do
        while not stopped.is_set():
            index = pipe.recv()
            try:
                worker, jobs = loaded = loaded or pickle.loads(content)  # made by the parent process a moment ago
                outcome = worker.run(jobs[index])
            except BaseException as error:
                if stopped.is_set():
                    return
                outcome = _sendable(error)
            pipe.send(outcome)


def _obey(orders: Connection, stopped: Event) -> None:
    """End with the parent, and on its order: after the update where there is one, otherwise at once.

    A parent that was killed cannot stop its children, and they would go on training.
    """
    parent = parent_process()
    assert parent is not None  # this runs in a child
    if parent.sentinel not in wait([parent.sentinel, orders]):
        with contextlib.suppress(EOFError, OSError):
            orders.recv_bytes()
            stopped.set()
            if not interrupt(signal.SIGTERM):
                os._exit(1)  # no training that could write a checkpoint
        wait([parent.sentinel])
    os._exit(1)


def _sendable(error: BaseException) -> BaseException:
    """The error with where it came from, as far as it can be sent."""
    text = "".join(traceback.format_exception(error))
    try:
        sent = pickle.loads(pickle.dumps(error))
    except Exception:  # of whatever kind: classes of errors may ask for arguments that pickle does not know of
        return RuntimeError(text)
    sent.add_note(f"in a process of its own:\n{text}")
    return sent
