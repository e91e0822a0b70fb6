"""Several workers by one command: processes, for Python has one interpreter lock.

The parent does no work. It starts the workers, starts one that died again, hands on what it is
told, and ends when all have. It has neither threads nor connections, so it may fork at any time,
and each worker reads the settings anew, as a process that is started again does.
"""

import os
import signal
import threading
import time
from collections import Counter
from typing import NamedTuple

import structlog
import typer

from pipeline import log_events
from pipeline.backoff import Backoff
from pipeline.errors import ExitCode
from pipeline.signals import IMPATIENT, ending, exit_code_of

log = structlog.get_logger("pipeline.cli")

RESTART = Backoff(first_s=1.0, longest_s=60.0)
"""Before a worker that died is started again."""
STEADY_S = 60.0
"""A worker that lived for so long begins anew with the pauses."""
DEATHS_MAX = 5
"""How often in a row one worker of a one-shot command may die."""
ORPHAN_S_MAX = 30.0
"""How long a worker may take to end whose parent is gone."""

# What a worker that is started again would only repeat: supervisors are told not to, too.
_FOR_HUMANS = frozenset({ExitCode.REFUSED, ExitCode.FENCED, ExitCode.CONFIGURATION})
_PARENTS_OWN = (signal.SIGCHLD, signal.SIGALRM)


def become_worker(count: int, *, until_end: bool) -> int:
    """Start the workers; returns in each of them, and in the parent never.

    A worker takes all signals that end it as one request, however often they come: a terminal or
    systemd may send them to parent and workers alike. Where the parent is gone, it ends too.

    Args:
        count: How many.
        until_end: They end by themselves.

    Returns:
        The worker's number, from 1; the signals that stop it are blocked.

    Raises:
        typer.Exit: In the parent: all have ended; with the highest of their codes.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*ending(), *_PARENTS_OWN))
    # Where the default is to ignore it, a system may drop it although it is blocked.
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


class _Life(NamedTuple):
    worker: int
    begun_at: float


class _Parent:
    def __init__(self, count: int, *, until_end: bool) -> None:
        self._until_end = until_end
        self._living: dict[int, _Life] = {}
        self._due_at = dict.fromkeys(range(1, count + 1), 0.0)
        self._deaths: Counter[int] = Counter()
        self._is_stopping = False
        # Nothing is ever written: its end tells the workers that we are gone.
        self._lifeline, self._held = os.pipe()
        self.exit_code = int(ExitCode.DONE)

    @property
    def has_workers(self) -> bool:
        """Whether one runs or is to be started."""
        return bool(self._living or self._due_at)

    def next_due(self) -> int | None:
        """A worker that is to be started now."""
        now = time.monotonic()
        return next((worker for worker, at in self._due_at.items() if at <= now), None)

    def fork(self, worker: int) -> bool:
        """Start a worker; true in the worker itself."""
        del self._due_at[worker]
        pid = os.fork()
        if pid:
            self._living[pid] = _Life(worker, time.monotonic())
            return False
        os.close(self._held)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENTS_OWN)
        log_events.set_worker(worker)
        threading.Thread(
            target=_end_with_parent, args=[self._lifeline], name="lifeline", daemon=True
        ).start()
        return True

    def listen(self) -> None:
        """Wait until a worker ends, one is due, or we are told to stop."""
        if self._due_at:
            pause = min(self._due_at.values()) - time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, max(pause, 0.001))
        number = signal.sigwait((*ending(), *_PARENTS_OWN))
        if number == signal.SIGCHLD:
            self._bury()
        elif number == signal.SIGALRM:
            return
        elif self._is_stopping and number in IMPATIENT:
            self._tell(signal.SIGKILL)
            raise typer.Exit(128 + number)
        elif not self._is_stopping:
            log.info("stop_requested", signal=signal.Signals(number).name, effect="all workers")
            self._note(exit_code_of(number))
            self._stop()

    def _bury(self) -> None:
        while self._living:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if life := self._living.pop(pid, None):  # as process 1 of a container we get others too
                self._ended(life, pid, os.waitstatus_to_exitcode(status))

    def _ended(self, life: _Life, pid: int, code: int) -> None:
        if self._is_stopping or not self._is_death(code):
            self._note(code)
            # What one of them refuses at the end is no reason to leave the others' work undone.
            if code in _FOR_HUMANS and not (self._until_end and code == ExitCode.REFUSED):
                self._stop()
            return
        if time.monotonic() - life.begun_at > STEADY_S:
            self._deaths[life.worker] = 0
        self._deaths[life.worker] += 1
        pause = RESTART.wait_s(self._deaths[life.worker])
        gives_up = self._until_end and self._deaths[life.worker] >= DEATHS_MAX
        log.error(
            "worker_died",
            worker=life.worker,
            pid=pid,
            exit_code=code if code >= 0 else None,
            signal=signal.Signals(-code).name if code < 0 else None,
            again_in_s=None if gives_up else pause,
        )
        if gives_up:
            self._note(code)
            self._stop()
        else:
            self._due_at[life.worker] = time.monotonic() + pause

    def _is_death(self, code: int) -> bool:
        meant = {ExitCode.DONE, ExitCode.UNAVAILABLE} if self._until_end else set()
        return code not in _FOR_HUMANS | meant

    def _note(self, code: int) -> None:
        self.exit_code = max(self.exit_code, code if code >= 0 else 128 - code)

    def _stop(self) -> None:
        self._is_stopping = True
        self._due_at.clear()
        self._tell(signal.SIGTERM)

    def _tell(self, number: signal.Signals) -> None:
        for pid in self._living:
            os.kill(pid, number)  # not waited for yet, so the number is still its own


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)
    log.warning("parent_ended", effect="this worker ends after its batch")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S_MAX)
    os._exit(ExitCode.INVARIANT)
