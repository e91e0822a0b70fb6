"""Programs of others, such as PostgreSQL, that end when our process ends, however it ends.

Such a program cannot watch a pipe, so a small process of ours, the guard, is its parent. The guard
ends with our process (see ``pipeline.lifeline``): it then ends the program and removes its folder.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.lifeline import on_parent_end

_SOURCE = Path(__file__).parents[3]
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from pipeline.sandbox.servers.guard import main; main(sys.argv[2])"
)
GRACE_SECONDS_MAX = 5.0
"""How long an orphaned server may take to end before it is killed."""


@dataclass(frozen=True)
class Account:
    """The user of the operating system that a server runs as."""

    name: str
    uid: int
    gid: int


class Guarded:
    """A running server. It ends at the latest a few seconds after this process.

    Args:
        command: What to run, by its full path. It gets no stdin.
        log: Both its outputs are appended here.
        account: The user to run it as; only root may name one.
        env: Its whole environment; ours if None.
        when_orphaned: The signal for the server after our end; SIGKILL follows after a grace time.
        remove: A folder to remove after our end; our own temporary one.

    Raises:
        OSError: The command cannot be run.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        account: Account | None = None,
        env: Mapping[str, str] | None = None,
        when_orphaned: signal.Signals = signal.SIGKILL,
        remove: Path | None = None,
    ) -> None:
        order = {
            "command": [str(part) for part in command],
            "log": str(log),
            "uid": account and account.uid,
            "gid": account and account.gid,
            "signal": int(when_orphaned),
            "remove": remove and str(remove),
        }
        # In a session of its own, so that Ctrl-C reaches only us, and we stop everything in order.
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(_SOURCE), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=None if env is None else dict(env),
            cwd="/",
        )
        assert self._guard.stdout is not None  # noqa: S101 # it is a pipe, three lines up
        with self._guard.stdout as output:
            answer = json.loads(output.readline() or '{"error": "its guard did not start"}')
        if "error" in answer:
            self.wait(GRACE_SECONDS_MAX)
            raise OSError(f"cannot run {command[0]}: {answer['error']}")
        self.pid: int = answer["pid"]

    def exit_status(self) -> int | None:
        """What the server ended with (128 + the number of a signal), or None while it runs."""
        return self._guard.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server itself; nothing happens if it has ended."""
        if self.exit_status() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its guard is ending
                os.kill(self.pid, number)

    def wait(self, seconds_max: float) -> int:
        """Wait until the server has ended.

        Raises:
            subprocess.TimeoutExpired: It still runs after ``seconds_max``.
        """
        status = self._guard.wait(seconds_max)
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        return status

    def end(self, number: signal.Signals, *, grace_seconds: float) -> int:
        """Send a signal that ends the server; kill it after the grace time."""
        self.send(number)
        try:
            return self.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            return self.wait(GRACE_SECONDS_MAX)


# From here on: the guard's own process. It sees only the standard library, starts in 15 ms, and
# ignores Python's environment variables, so that coverage does not measure it.


def _ended_with_the_guard() -> Callable[[], None] | None:  # pragma: no cover - see above
    """On Linux, a function that makes the server end if somebody kills its guard."""
    if sys.platform != "linux":
        return None
    import ctypes  # here, because it takes 10 ms

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_parent_death_signal = 1
    return lambda: prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)


def _guard(order: dict[str, Any]) -> int:  # pragma: no cover - see above
    # There is one thread so far, so that a function between fork and exec is safe. It runs after
    # the change of user, which would clear the setting.
    with Path(order["log"]).open("ab") as log:
        server = subprocess.Popen(
            order["command"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            user=order["uid"],
            group=order["gid"],
            extra_groups=None if order["uid"] is None else [],
            preexec_fn=_ended_with_the_guard(),
        )
    print(json.dumps({"pid": server.pid}), flush=True)  # noqa: T201 # the answer to our parent
    orphaned = threading.Event()

    def end_server() -> None:
        orphaned.set()
        server.send_signal(order["signal"])
        server.send_signal(signal.SIGCONT)
        try:
            server.wait(GRACE_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            server.kill()

    on_parent_end(sys.stdin.fileno(), end_server)
    status: int = server.wait()
    if orphaned.is_set() and order["remove"] is not None:
        shutil.rmtree(order["remove"], ignore_errors=True)
    return status if status >= 0 else 128 - status


def main(order: str) -> None:  # pragma: no cover - see above
    """Be the guard."""
    try:
        sys.exit(_guard(json.loads(order)))
    except OSError as failure:
        print(json.dumps({"error": str(failure)}), flush=True)  # noqa: T201 # the answer to our parent
        sys.exit(1)
