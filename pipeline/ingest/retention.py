"""When Kafka deletes the oldest record that is not in the log."""

import time
from collections.abc import Callable
from datetime import timedelta


class RetentionDeadline:
    """The deadline as last known, for the log lines about an outage.

    Kept as a moment and for as long as the process, so that it is known while Kafka does not answer
    and between two memberships.
    """

    def __init__(self) -> None:
        self._request: Callable[[], float | None] | None = None
        self._deadline: float | None = None

    def connect(self, request: Callable[[], float | None]) -> None:
        """From now on ``request`` requests the deadline from Kafka, in seconds since 1970."""
        self._request = request

    def disconnect(self) -> None:
        """Send no more requests."""
        self._request = None

    def update(self, deadline: float | None) -> None:
        """Store the deadline, in seconds since 1970; None if it is not known."""
        self._deadline = deadline

    def time_left(self) -> timedelta | None:
        """The time until the deadline, as last known; negative if it has passed."""
        if self._deadline is None:
            return None
        return timedelta(seconds=self._deadline - time.time())

    def requested_time_left(self) -> timedelta | None:
        """The same, after a request to Kafka, which usually answers while the database does not."""
        if self._request is not None and (deadline := self._request()) is not None:
            self._deadline = deadline
        return self.time_left()
