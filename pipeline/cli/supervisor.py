"""Several workers by one command: processes, because Python has one interpreter lock.

The parent does no work. It starts the workers, restarts one that died, forwards signals, and ends
when all workers have ended. It has neither threads nor connections, so that it may fork at any
time, and each worker reads the settings again, as a restarted process does.
"""

import os
import signal
import time
from collections import Counter
from typing import NamedTuple

import structlog
import typer

from pipeline import log_events
from pipeline.backoff import Backoff
from pipeline.errors import ExitCode
from pipeline.lifeline import on_parent_end
from pipeline.signals import IMPATIENT, ending, exit_code_of

log = structlog.get_logger("pipeline.cli")

RESTART = Backoff(first_s=1.0, longest_s=60.0)
"""Before a worker that died is restarted."""
STEADY_S = 60.0
"""After this time, the next death of a worker counts as its first."""
DEATHS_MAX = 5
"""Maximum deaths in a row of one worker of a one-shot command."""
ORPHAN_S_MAX = 30.0
"""Maximum time that a worker takes to end after its parent."""

# A restart would only repeat these; service managers do not restart after them either.
_PERMANENT = frozenset({ExitCode.REFUSED, ExitCode.FENCED, ExitCode.CONFIGURATION})
_PARENTS_OWN = (signal.SIGCHLD, signal.SIGALRM)


def become_worker(count: int, *, until_end: bool) -> int:
    """Start the workers. Returns in each of them, and never in the parent.

    A worker treats all signals that end it as one request, because a terminal or systemd may send
    them to parent and workers alike. A worker ends after its parent.

    Args:
        count: How many.
        until_end: The workers end by themselves.

    Returns:
        The worker's number, from 1; the signals that stop it are blocked.

    Raises:
        typer.Exit: In the parent, with the highest exit code, when all have ended.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*ending(), *_PARENTS_OWN))
    # A system may drop a blocked signal whose default is to be ignored.
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    parent = _Parent(count, until_end=until_end)
    log.info("workers_started", workers=count, pid=os.getpid())
    while parent.has_workers:
        number = parent.next_due()
        if number is None:
            parent.listen()
        elif parent.fork(number):
            return number
    log.info("workers_ended", exit_code=parent.exit_code)
    raise typer.Exit(parent.exit_code)


class _Running(NamedTuple):
    worker: int
    started_at: float


class _Parent:
    def __init__(self, count: int, *, until_end: bool) -> None:
        self._until_end = until_end
        self._running: dict[int, _Running] = {}
        self._due_at = dict.fromkeys(range(1, count + 1), 0.0)
        self._deaths: Counter[int] = Counter()
        self._is_stopping = False
        # Its end tells the workers that the parent has ended.
        self._lifeline, self._held = os.pipe()
        self.exit_code = int(ExitCode.DONE)

    @property
    def has_workers(self) -> bool:
        """Whether a worker runs or must be started."""
        return bool(self._running or self._due_at)

    def next_due(self) -> int | None:
        """A worker that must be started now."""
        now = time.monotonic()
        return next((worker for worker, at in self._due_at.items() if at <= now), None)

    def fork(self, worker: int) -> bool:
        """Start a worker. True in the worker itself."""
        del self._due_at[worker]
        pid = os.fork()
        if pid:
            self._running[pid] = _Running(worker, time.monotonic())
            return False
        os.close(self._held)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENTS_OWN)
        log_events.set_worker(worker)
        on_parent_end(self._lifeline, _end_after_batch)
        return True

    def listen(self) -> None:
        """Wait until a worker ends, one must be started, or a signal requests the end."""
        if self._due_at:
            pause = min(self._due_at.values()) - time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, max(pause, 0.001))
        number = signal.sigwait((*ending(), *_PARENTS_OWN))
        if number == signal.SIGCHLD:
            self._reap()
        elif number == signal.SIGALRM:
            return
        elif self._is_stopping and number in IMPATIENT:
            self._signal_all(signal.SIGKILL)
            raise typer.Exit(128 + number)
        elif not self._is_stopping:
            log.info("stop_requested", signal=signal.Signals(number).name, effect="all workers")
            self._keep_highest(exit_code_of(number))
            self._stop()

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if process := self._running.pop(pid, None):  # process 1 of a container gets others too
                self._ended(process, pid, os.waitstatus_to_exitcode(status))

    def _ended(self, process: _Running, pid: int, code: int) -> None:
        if self._is_stopping or not self._is_death(code):
            self._keep_highest(code)
            # If one of them refuses at the end, the others still finish their work.
            if code in _PERMANENT and not (self._until_end and code == ExitCode.REFUSED):
                self._stop()
            return
        if time.monotonic() - process.started_at > STEADY_S:
            self._deaths[process.worker] = 0
        self._deaths[process.worker] += 1
        pause = RESTART.wait_s(self._deaths[process.worker])
        is_last = self._until_end and self._deaths[process.worker] >= DEATHS_MAX
        log.error(
            "worker_died",
            worker=process.worker,
            pid=pid,
            exit_code=code if code >= 0 else None,
            signal=signal.Signals(-code).name if code < 0 else None,
            restart_in_s=None if is_last else pause,
        )
        if is_last:
            self._keep_highest(code)
            self._stop()
        else:
            self._due_at[process.worker] = time.monotonic() + pause

    def _is_death(self, code: int) -> bool:
        meant = {ExitCode.DONE, ExitCode.UNAVAILABLE} if self._until_end else set()
        return code not in _PERMANENT | meant

    def _keep_highest(self, code: int) -> None:
        self.exit_code = max(self.exit_code, code if code >= 0 else 128 - code)

    def _stop(self) -> None:
        self._is_stopping = True
        self._due_at.clear()
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._running:
            os.kill(pid, number)  # not reaped yet, so that the pid is still its own


def _end_after_batch() -> None:
    log.warning("parent_ended", effect="this worker ends after its current batch")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S_MAX)
    os._exit(ExitCode.INVARIANT)
