"""Signals that ask a run to stop, in every process that belongs to it: it saves and ends, to be resumed.

Schedulers signal a process or all of a job; a terminal tells every process of a Ctrl-C. The process that
trains ends its step and saves; one that has only started others passes signals on; workers of data loaders
ignore them, since the step that is to be saved needs them.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

# What schedulers send before they kill a job: SLURM by default SIGTERM, or what `--signal` says. Terminals
# send SIGINT for Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# What a shell reports for a process that a signal has ended.
STOP_EXIT_CODES = tuple(128 + number for number in STOP_SIGNALS)
# On macOS signals that were held back in a new process cannot be let through again.
_CAN_HOLD_BACK = hasattr(signal, "sigwaitinfo")


class Interrupted(SystemExit):
    """The run was asked to stop, its state is saved, and the process ends with 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class StopRequest:
    """Remembers that a signal has asked this process to stop.

    Args:
        second_ends: whether a second SIGINT ends the process at once. Not so under torchrun, which passes on
            what this process may have heard before.

    Attributes:
        number: of the signal; None while there was none.
    """

    def __init__(self, second_ends: bool = True) -> None:
        self.number: int | None = None
        self._second_ends = second_ends
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
        with _handling(self._receive, self._second_ends):
            yield

    @contextlib.contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """While there is nothing to save, do not wait for the end of a step.

        Raises:
            Interrupted: when a signal comes, or has come. What else fails then does so because of it.
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
        more = "; a second Ctrl-C ends it at once" if number == signal.SIGINT and self._second_ends else ""
        logger.warning(
            "%s: the run will end after this step and save its state, and --resume continues it%s", name, more
        )


@contextlib.contextmanager
def passing_on_to_children() -> Iterator[StopRequest]:
    """Pass `STOP_SIGNALS` on to the processes that this one has started, which end it by ending.

    A SIGINT arrives there as SIGTERM: see `leave_interrupts_to_parent`. The second one kills them.

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

    with _handling(forward, second_ends=True):
        try:
            yield stop
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()
            raise Interrupted(signal.SIGINT) from None


@contextlib.contextmanager
def held_back(*numbers: int) -> Iterator[None]:
    """While processes are started, which inherit it: signals stay pending in them until they are ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_interrupts_to_parent() -> None:
    """In a process that trains beside others: do nothing on SIGINT, unless torch sends it for a dead parent.

    Only the parent can tell a Ctrl-C, of which the terminal tells every process, from a second one. To be
    called in a process that was started with SIGINT `held_back`.
    """

    def receive(number: int, frame: object) -> None:
        if os.getppid() != multiprocessing.parent_process().pid:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, receive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def workers_held_back() -> contextlib.AbstractContextManager[None]:
    """`held_back`, for the start of processes that call `survive_signals`: they may take seconds to do so."""
    return held_back(*STOP_SIGNALS) if _CAN_HOLD_BACK else contextlib.nullcontext()


def survive_signals(worker_id: int) -> None:
    """In a data loader's worker: heed SIGTERM, from the training process alone, and no other signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not _CAN_HOLD_BACK:
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    # torch watches it as well, but only once a worker has started: if it is gone by then, the worker stays.
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


@contextlib.contextmanager
def _handling(handler: Callable[[int], None], second_ends: bool) -> Iterator[None]:
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
            if second_ends:
                signal.signal(number, before[number])
        handler(number)

    for number in before:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
