"""What a signal does to a command: it ends in order, logs that, and has a fitting exit code.

SIGTERM and Ctrl-C request the end of a command; a command that runs until stopped then exits with
0. Every other signal that would end a process without a message (a terminal is closed, a stray
``kill -HUP``) is an interruption: the command ends in the same order, but with 128 + the signal's
number. For systemd and Kubernetes this is a failure, so that they restart it.

Signals that were ignored when the command started stay ignored: SIGHUP under ``nohup``, Ctrl-C in
the background of a script.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pipeline import failpoints

REQUESTS = (signal.SIGTERM, signal.SIGINT)
"""Request the end of a command; it may exit with 0."""
INTERRUPTIONS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""End a process by default, without a message; a supervisor must see that it was interrupted."""
IMPATIENT = (*REQUESTS, signal.SIGQUIT)
"""As a second signal, these end a command at once. SIGHUP does not: systemd (``SendSIGHUP=``) and
shells send it directly after another signal."""
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


def ending() -> tuple[signal.Signals, ...]:
    """The signals that end a command, without those that were ignored when it started."""
    return tuple(
        number
        for number in (*REQUESTS, *INTERRUPTIONS)
        if number not in _MAY_BE_IGNORED or signal.getsignal(number) is not signal.SIG_IGN
    )


def exit_code_of(number: int) -> int:
    """The exit code of a command that runs until stopped, after this signal."""
    return 0 if number in REQUESTS else 128 + number


class Stop(threading.Event):
    """Is set when the command must end.

    Attributes:
        number: The signal that set it; 0 for none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def by(self, number: int) -> None:
        """Set it because of a signal."""
        self.number = number
        self.set()

    @property
    def reason(self) -> str:
        """The signal's name; for another part of the process that ended, that."""
        return signal.Signals(self.number).name if self.number else "a part of the process ended"

    @property
    def exit_code(self) -> int:
        """Of a command that runs until stopped: 0, unless an interruption set it."""
        return exit_code_of(self.number) if self.number else 0


@contextmanager
def stopped_by_signals(*, second_ends: bool = True) -> Iterator[Stop]:
    """An event that the first signal sets; the command finishes its batch.

    A separate thread waits for signals, because a signal handler cannot set an event safely.

    Args:
        second_ends: A second signal of ``IMPATIENT`` ends the process at once; else it changes
            nothing.
    """
    import structlog  # here, because help and completion do not need it

    log = structlog.get_logger(__name__)
    stop, over = Stop(), threading.Event()
    signals = ending()

    def watch() -> None:
        while True:
            number = signal.sigwait(signals)
            if over.is_set():
                return
            if stop.is_set() and second_ends and number in IMPATIENT:
                os._exit(128 + number)
            if stop.is_set():
                continue
            log.info(
                "stop_requested",
                signal=signal.Signals(number).name,
                effect="ends after the current batch",
            )
            stop.by(number)
            failpoints.reach("on_sigterm")

    # Blocked before any other thread exists: threads inherit this, so only the watcher gets them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        over.set()
        if watcher.is_alive() and watcher.ident is not None:
            signal.pthread_kill(watcher.ident, signal.SIGTERM)
            watcher.join()
        # Later signals request what is already done.
        while signal.sigtimedwait(signals, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def raised_by_signals() -> Iterator[None]:
    """Turn signals into exceptions, for commands that end by themselves.

    Connections are closed in order, and the open transaction is rolled back. A second signal ends
    the process at once.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM; its argument is the number.
        SystemExit: Any other, with 128 + its number.
    """
    signals = ending()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for ending_signal in signals:
            signal.signal(ending_signal, signal.SIG_DFL)
        if number in REQUESTS:
            raise KeyboardInterrupt(number)
        _print(f"pipeline: ended by {signal.Signals(number).name} before it was done.")
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(text: str) -> None:
    """One line for a person, on a stderr that may be closed."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
