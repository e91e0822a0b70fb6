"""What happened in a soak, and what went wrong: written by many threads, read at the end."""

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psycopg

from tests import waiting

BACK_SECONDS_MAX = 240.0
"""Maximum time until something recovers by itself; the machine may be busy."""
FAILURES_MAX = 20

T = TypeVar("T")


class MissedError(Exception):
    """A fault had no target, so it does not count."""


class Journal:
    """Faults with their time and length, and every reason why the soak has failed.

    Args:
        folder: Where ``faults.jsonl`` is written, one line per fault.
    """

    def __init__(self, folder: Path) -> None:
        self.began = time.monotonic()
        self.failed = threading.Event()
        self.failures: list[str] = []
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: dict[int, str] = {}
        self.missed = 0
        self._path = folder / "faults.jsonl"
        self._lock = threading.Lock()

    @property
    def now(self) -> float:
        """Seconds since the soak began."""
        return time.monotonic() - self.began

    @property
    def running(self) -> list[str]:
        """The faults that are under way."""
        with self._lock:
            return list(self._running.values())

    def fail(self, what: str) -> None:
        """Record why the soak has failed; everything ends soon after the first reason."""
        with self._lock:
            if len(self.failures) < FAILURES_MAX:
                beside = ", ".join(self._running.values()) or "nothing"
                self.failures.append(f"at {self.now:.1f} s, beside {beside}: {what}")
        self.failed.set()

    @contextmanager
    def fault(self, name: str) -> Iterator[None]:
        """A fault, from its beginning to its end."""
        began, number = self.now, threading.get_ident()
        with self._lock:
            self._running[number] = name
        missed = False
        try:
            yield
        except MissedError:
            missed = True
        finally:
            took = self.now - began
            with self._lock:
                del self._running[number]
                self.missed += missed
                if not missed:
                    self.counts[name] += 1
                    self.seconds[name] += took
                with self._path.open("a") as lines:
                    line = {"fault": name, "at_s": round(began, 1), "took_s": round(took, 1)}
                    lines.write(json.dumps(line | ({"missed": True} if missed else {})) + "\n")


def patiently(work: Callable[[], T], what: str) -> T:
    """Do something with PostgreSQL, again and again while it is unavailable.

    Raises:
        AssertionError: It was unavailable for too long.
        LockNotAvailable: PostgreSQL is available, and another session holds the lock.
    """
    done: list[T] = []

    def is_done() -> bool:
        try:
            done.append(work())
        except psycopg.errors.LockNotAvailable:
            raise
        except psycopg.OperationalError:
            time.sleep(0.2)
            return False
        return True

    waiting.until(is_done, what, seconds_max=BACK_SECONDS_MAX)
    return done[0]
