"""Signals that ask a run to stop: it saves and ends, to be resumed."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

# What schedulers send before they kill a job: SLURM by default SIGTERM, or what `--signal` says.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# What a shell reports for a process that a signal has ended.
STOP_EXIT_CODES = tuple(128 + number for number in STOP_SIGNALS)


class Interrupted(SystemExit):
    """The run was asked to stop, its state is saved, and the process ends with 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class StopRequest:
    """Remembers that a signal has asked this process to stop.

    Attributes:
        number: of the signal; None while there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once = False

    def __call__(self) -> bool:
        return self.number is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of `STOP_SIGNALS` instead of ending. Outside the main thread, which alone gets signals,
        this does nothing."""
        with _handling(self._receive):
            yield

    @contextlib.contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """While there is nothing to save, do not wait for the end of a step.

        Raises:
            Interrupted: when a signal comes, or has come. What else fails then does so because of it: worker
                processes get the signal as well.
        """
        self._at_once = True
        try:
            if self.number is not None:
                raise Interrupted(self.number)
            yield
        except Exception:
            if self.number is None:
                raise
            raise Interrupted(self.number) from None
        finally:
            self._at_once = False

    def _receive(self, number: int, frame: object) -> None:
        self.number = number
        name = signal.Signals(number).name
        if self._at_once:
            logger.warning("%s: the run ends, its state was saved before; --resume continues it", name)
            raise Interrupted(number)
        logger.warning("%s: the run will end after this step and save its state", name)


@contextlib.contextmanager
def passing_on_to_children() -> Iterator[StopRequest]:
    """Pass `STOP_SIGNALS` on to the processes that this one has started, which end it by ending.

    Yields:
        what remembers the signal.

    Raises:
        Interrupted: when a signal comes and there is no process.
    """
    stop = StopRequest()

    def forward(number: int, frame: object) -> None:
        stop.number = number
        children = multiprocessing.active_children()
        if not children:
            # Those that are yet to be started would not hear of it.
            raise Interrupted(number)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    with _handling(forward):
        yield stop


@contextlib.contextmanager
def _handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
