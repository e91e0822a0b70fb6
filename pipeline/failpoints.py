"""Marked places where tests make the process fail; nothing happens unless they are enabled.

``PIPELINE_ENABLE_FAILPOINTS=1`` and ``PIPELINE_FAILPOINT=NAME[@N]:ACTION`` arm one place, at its
N-th passing (the first by default). Actions: ``kill`` (SIGKILL), ``stop`` (SIGSTOP),
``raise:SQLSTATE``, ``sleep:SECONDS``; ``disconnect`` closes the socket of the database connection
that the place hands over. Without the first variable the second is refused at start, so no
production process can be armed by accident.
"""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping
from typing import Literal, get_args

from pipeline.errors import ConfigurationError, from_sqlstate

Place = Literal[
    "after_poll",
    "after_begin",
    "after_fence",
    "mid_copy",
    "after_copy",
    "before_commit",
    "after_commit_before_ack",
    "after_commit",
    "after_kafka_commit",
    "in_on_assign",
    "in_on_revoke",
    "in_on_lost",
    "after_projection",
    "mid_rebuild",
    "before_swap",
    "after_swap",
    "before_fill",
    "mid_fill",
    "after_fill",
    "after_closing",
    "mid_migration",
    "mid_read_models",
    "on_sigterm",
]


_SPEC = re.compile(
    r"(?P<place>\w+)(?:@(?P<passing>[1-9][0-9]*))?:(?P<action>kill|stop|disconnect"
    r"|sleep:(?P<seconds>[0-9]+(?:\.[0-9]+)?)|raise:(?P<sqlstate>[0-9A-Z]{5}))"
)


class _Armed:
    def __init__(self, spec: str) -> None:
        parts = _SPEC.fullmatch(spec)
        if parts is None or parts["place"] not in get_args(Place):
            raise ConfigurationError(
                f"PIPELINE_FAILPOINT: {spec!r} is not NAME[@N]:ACTION with an ACTION of kill, "
                "stop, disconnect, sleep:SECONDS, raise:SQLSTATE and a NAME of "
                f"{', '.join(get_args(Place))}"
            )
        self.place = parts["place"]
        self.action = parts["action"].partition(":")[0]
        self.argument = parts["seconds"] or parts["sqlstate"] or ""
        self.passings_left = int(parts["passing"] or 1)

    def reach(self, place: str, connection_fd: int | None) -> None:
        if place != self.place:
            return
        self.passings_left -= 1
        if self.passings_left == 0:
            self._act(connection_fd)

    def _act(self, connection_fd: int | None) -> None:
        match self.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                # To this very thread: sent to the process, the main thread takes it, and this one
                # goes on until that has come to run.
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            case "sleep":
                time.sleep(float(self.argument))
            case "raise":
                raise from_sqlstate(self.argument, f"fail point {self.place}: {self.argument}")
            case "disconnect" if connection_fd is not None:
                with socket.socket(fileno=os.dup(connection_fd)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
            case _:
                raise ConfigurationError(
                    f"PIPELINE_FAILPOINT: {self.action!r} cannot be done at {self.place}"
                )


_armed: _Armed | None = None


def arm(environment: Mapping[str, str]) -> None:
    """Arm the place that the environment names; called once, at the start of a command.

    Raises:
        ConfigurationError: A fail point is named but not enabled, or is not one we have.
    """
    global _armed
    spec = environment.get("PIPELINE_FAILPOINT")
    if spec is None:
        return
    if environment.get("PIPELINE_ENABLE_FAILPOINTS") != "1":
        raise ConfigurationError(
            "PIPELINE_FAILPOINT is set, but PIPELINE_ENABLE_FAILPOINTS is not 1: fail points are "
            "for tests only"
        )
    _armed = _Armed(spec)


def reach(place: Place, *, connection_fd: int | None = None) -> None:
    """Pass a marked place: a no-op unless it is armed.

    Args:
        place: The name of the place.
        connection_fd: File descriptor of the database connection at risk here, for ``disconnect``.
    """
    if _armed is not None:
        _armed.reach(place, connection_fd)
