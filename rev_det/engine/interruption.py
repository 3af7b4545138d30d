"""Signals that ask a run to stop: it saves and ends, to be resumed."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

from .torchrun import under_torchrun

logger = logging.getLogger(__name__)

# What schedulers send before they kill a job: SLURM by default SIGTERM, or what `--signal` says. Terminals
# send SIGINT for Ctrl-C, to every process that they see in the foreground.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)
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
        """Take note of `STOP_SIGNALS` instead of ending.

        The second SIGINT does again what it did before, which is to raise KeyboardInterrupt. Where others
        handle SIGINT, or ignore it, it is left to them. Outside the main thread, which alone gets signals,
        this does nothing.
        """
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

    def _receive(self, number: int) -> None:
        self.number = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self._at_once:
            logger.warning("%s: the run ends, its state was saved before; --resume continues it", name)
            raise Interrupted(number)
        more = "; a second Ctrl-C ends it at once" if number == signal.SIGINT and not under_torchrun() else ""
        logger.warning(
            "%s: the run will end after this step and save its state, and --resume continues it%s", name, more
        )


@contextlib.contextmanager
def passing_on_to_children() -> Iterator[StopRequest]:
    """Pass `STOP_SIGNALS` on to the processes that this one has started, which end it by ending.

    A SIGINT arrives there as SIGTERM: see `leaving_interrupts_to_parent`. The second one kills them.

    Yields:
        what remembers the signal.

    Raises:
        Interrupted: when a signal comes and there is no process, or with the second SIGINT.
    """
    stop = StopRequest()

    def forward(number: int) -> None:
        stop.number = number
        children = multiprocessing.active_children()
        if not children:
            # Those that are yet to be started would not hear of it.
            raise Interrupted(number)
        if number == signal.SIGINT:
            logger.warning("Ctrl-C: all processes are sent SIGTERM; a second Ctrl-C ends them at once")
            number = signal.SIGTERM
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)

    with _handling(forward):
        try:
            yield stop
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()
            raise Interrupted(signal.SIGINT) from None


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """While processes are started: a SIGINT stays pending in them until `leave_interrupts_to_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_interrupts_to_parent() -> None:
    """In a started process: do nothing on SIGINT, unless torch sends it because the parent has died.

    Of one Ctrl-C the terminal tells every process. Only the parent can tell it from a second one.
    """

    def receive(number: int, frame: object) -> None:
        if os.getppid() != multiprocessing.parent_process().pid:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, receive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def _handling(handler: Callable[[int], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if before[signal.SIGINT] not in (signal.default_int_handler, signal.SIG_DFL):
        del before[signal.SIGINT]

    def receive(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            # Data loaders' workers inherit this, and hear of a Ctrl-C as well.
            if os.getpid() != process:
                return
            # torchrun passes on what workers may have heard before.
            if not under_torchrun():
                signal.signal(number, before[number])
        handler(number)

    for number in before:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
