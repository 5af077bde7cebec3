"""Stopping in order: a signal sets a flag, the loop finishes its step or gives up waiting for it, saves and returns."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """A wish to stop, set by a signal or by hand; the loop looks at it after each step, and while it waits for data."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why, or None while nobody wants to stop."""

    @property
    def is_set(self) -> bool:
        """Whether somebody wants to stop."""
        return self.reason is not None

    def set(self, reason: str = "asked to stop") -> None:
        """Ask the loop to save and return after the step at hand; the first reason stays."""
        self.reason = self.reason or reason

    @contextmanager
    def on_signals(self) -> Generator[None]:
        """Let SIGTERM and Ctrl-C set the flag while inside; a second one raises KeyboardInterrupt at once.

        Outside the main thread, where Python installs no handlers, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _frame: FrameType | None) -> None:
            if self.is_set:
                raise KeyboardInterrupt
            self.set(signal.Signals(number).name)

        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
