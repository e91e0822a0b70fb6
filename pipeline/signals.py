"""What a signal does to a command: it ends in order, says so, and its exit code tells how.

SIGTERM and Ctrl-C are how a command is asked to end: what is asked to run until stopped exits with
0. Any other signal that would end a process without a word (a terminal that closes, a stray
``kill -HUP``) is taken as an interruption: the command ends in the same order, but with 128 + the
signal's number, which systemd and Kubernetes take for a failure, so they start it again.

Signals that the command was started to ignore stay ignored: SIGHUP under ``nohup``, Ctrl-C in the
background of a script.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import structlog

from pipeline import failpoints

log = structlog.get_logger(__name__)

REQUESTS = (signal.SIGTERM, signal.SIGINT)
"""Ask a command to end; it may exit with 0."""
INTERRUPTIONS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""End a process by default, without a word; a supervisor must see that it did not end by itself."""
IMPATIENT = (*REQUESTS, signal.SIGQUIT)
"""As a second signal these end a command at once. SIGHUP does not: systemd (``SendSIGHUP=``) and
shells send it right after another one."""
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


def ending() -> tuple[signal.Signals, ...]:
    """The signals that end a command, less those that it was started to ignore."""
    return tuple(
        number
        for number in (*REQUESTS, *INTERRUPTIONS)
        if number not in _MAY_BE_IGNORED or signal.getsignal(number) is not signal.SIG_IGN
    )


def exit_code_of(number: int) -> int:
    """The exit code of a command that runs until stopped, when this signal has stopped it."""
    return 0 if number in REQUESTS else 128 + number


class Stop(threading.Event):
    """Is set when the command is to end.

    Attributes:
        number: The signal that has set it; 0 for none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def by(self, number: int) -> None:
        """Set it because of a signal."""
        self.number = number
        self.set()

    @property
    def exit_code(self) -> int:
        """Of a command that runs until stopped: 0, unless an interruption has set it."""
        return exit_code_of(self.number) if self.number else 0


@contextmanager
def stopped_by_signals(*, second_ends: bool = True) -> Iterator[Stop]:
    """An event that the first signal sets; the batch in hand is finished.

    A thread of its own takes the signals, for a handler may not even set an event safely.

    Args:
        second_ends: A second signal of ``IMPATIENT`` ends the process at once; else it changes
            nothing.
    """
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
            log.info("stopping", signal=signal.Signals(number).name, effect="after this batch")
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
        # What has come meanwhile asks for what is done already.
        while signal.sigtimedwait(signals, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def raised_by_signals() -> Iterator[None]:
    """Turn signals into exceptions, for commands that are done when they are done.

    What is open is closed in order, the transaction in hand is rolled back. A second signal ends
    the process at once.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM; its argument is the number.
        SystemExit: Any other, with 128 + its number.
    """
    signals = ending()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        if number in REQUESTS:
            raise KeyboardInterrupt(number)
        tell(f"pipeline: ended by {signal.Signals(number).name} before it was done.")
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


def tell(text: str) -> None:
    """One line for a person, on a stderr that may have gone with its terminal."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def open_standard_streams() -> None:
    """See that 0, 1 and 2 are open.

    Started without them (``2>&-``), the next file to be opened, a database's socket perhaps, would
    take the number 2, and whatever is written to stderr would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - open for as long as we run
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
