"""Ctrl-C and SIGTERM during training: the first one waits for the step to end, the second one does not."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TERMINATED = 128 + signal.SIGTERM

_open: list["Interruption"] = []  # the contexts that are entered now


def ignore_signals() -> None:
    """For processes that end with their parent: a signal to the whole group reaches it too, and it gives the order."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupt(number: int) -> bool:
    """Do to all contexts of this process what a first signal does, from any thread and even where it is ignored.

    Args:
        number: The signal, SIGINT or SIGTERM.

    Returns:
        Whether there is a context.
    """
    contexts = list(_open)
    for context in contexts:
        if context.pending is None:
            context.pending = number
    return bool(contexts)


class Interruption:
    """A context in which a first SIGINT or SIGTERM only sets `pending`, and a second one takes effect at once.

    The earlier handlers are back when the context ends. Signals that the process ignores stay ignored, and outside
    the main thread, where Python allows no handlers, the context does nothing.

    Attributes:
        pending: The signal that came, None as long as there was none.
    """

    def __init__(self) -> None:
        """Nothing is installed before the context is entered."""
        self.pending: int | None = None
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        """Install the handlers."""
        _open.append(self)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the earlier handlers back, and let a signal that is still pending take effect."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier.clear()
        _open.remove(self)
        if error is None:
            self.raise_pending()

    def raise_pending(self) -> None:
        """End the program the way the signal asks for, if one came.

        Raises:
            KeyboardInterrupt: After SIGINT.
            SystemExit: After SIGTERM, with code 143.
        """
        if self.pending == signal.SIGINT:
            raise KeyboardInterrupt
        if self.pending is not None:
            raise SystemExit(_TERMINATED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            self.pending = number
            self.raise_pending()
        self.pending = number
