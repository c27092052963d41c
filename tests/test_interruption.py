import os
import signal
import threading

import pytest

from metaicl.interruption import Interruption, interrupt

ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ENDS)
def test_the_first_signal_waits_and_the_second_does_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    reached = []

    def run() -> None:
        with Interruption() as interruption:
            send(number)
            reached.append(interruption.pending)
            send(number)
            reached.append("never")

    with pytest.raises(ENDS[number]) as caught:
        run()
    assert reached == [number]
    assert signal.getsignal(number) is before
    if number == signal.SIGTERM:
        assert caught.value.code == 143


@pytest.mark.parametrize("number", ENDS)
def test_a_pending_signal_takes_effect_at_the_end(number: signal.Signals) -> None:
    reached = []

    def run() -> None:
        with Interruption():
            send(number)
            reached.append("end")

    with pytest.raises(ENDS[number]):
        run()
    assert reached == ["end"]


def test_an_error_is_not_hidden_by_a_signal() -> None:
    def run() -> None:
        with Interruption():
            send(signal.SIGINT)
            raise ValueError("real")

    with pytest.raises(ValueError, match="real"):
        run()


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            send(signal.SIGINT)
        assert interruption.pending is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_installs_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with Interruption():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_another_thread_can_interrupt_where_signals_are_ignored() -> None:
    assert not interrupt(signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pending = []

    def run() -> None:
        with Interruption() as interruption:
            thread = threading.Thread(target=lambda: pending.append(interrupt(signal.SIGTERM)))
            thread.start()
            thread.join()
            pending.append(interruption.pending)
            assert interrupt(signal.SIGINT)  # the first one counts

    try:
        with pytest.raises(SystemExit) as caught:
            run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert pending == [True, signal.SIGTERM]
    assert caught.value.code == 143
    assert not interrupt(signal.SIGTERM)
