"""Log lines that repeat: each text at most once per interval, with how often it occurred."""

import re
import time


def without_numbers(message: str) -> str:
    """The same for every message about one cause: it may count seconds or name a port."""
    return re.sub(r"[0-9]+", "", message)


class RateLimit:
    """Allows one log line per interval and text; counts those in between."""

    def __init__(self, interval_s_min: float) -> None:
        self._interval_s_min = interval_s_min
        self._logged: dict[str, tuple[float, int]] = {}

    def occurrences_to_log(self, text: str) -> int:
        """How often it occurred since its last log line; 0 if no line is due."""
        now = time.monotonic()
        logged_at, suppressed = self._logged.get(text, (float("-inf"), 0))
        if now - logged_at < self._interval_s_min:
            self._logged[text] = (logged_at, suppressed + 1)
            return 0
        self._logged[text] = (now, 0)
        return suppressed + 1
