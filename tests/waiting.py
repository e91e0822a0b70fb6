"""Waiting for a condition, within a bound."""

import time
from collections.abc import Callable
from typing import Any

POLL_S = 0.02


def until(condition: Callable[[], Any], what: str, *, seconds_max: float) -> Any:
    """Wait for a condition; its result.

    Raises:
        AssertionError: It did not become true in time; the message contains ``what``.
    """
    deadline = time.monotonic() + seconds_max
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds_max:.0f} s: {what}"
        time.sleep(POLL_S)
    return found
