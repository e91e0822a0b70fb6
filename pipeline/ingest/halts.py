"""The log lines about halted partitions: each refusal once, one line per cause."""

from collections.abc import Collection, Iterable

import structlog

from pipeline.errors import RefusedError
from pipeline.partitions import Partition

log = structlog.get_logger(__name__)


class HaltLog:
    """Logs which partitions are halted, why, and when they are resumed.

    It lives as long as the process: the group may take a halted partition away and assign it again,
    in this membership or in the next one.
    """

    def __init__(self) -> None:
        self._logged: dict[Partition, str] = {}

    def log_halted(self, refusals: Iterable[RefusedError]) -> None:
        """Log the refusals that are new, one line per cause."""
        causes: dict[str, list[Partition]] = {}
        for refusal in refusals:
            if self._logged.get(refusal.partition) != refusal.cause:
                causes.setdefault(refusal.cause, []).append(refusal.partition)
        for cause, partitions in causes.items():
            self.mark_logged(cause, partitions)
            log.error("partitions_halted", partitions=_names(partitions), reason=cause)

    def mark_logged(self, cause: str, partitions: Iterable[Partition]) -> None:
        """Do not log this cause for these partitions: another line has it."""
        self._logged |= dict.fromkeys(partitions, cause)

    def log_resumed(self, claimed: Collection[Partition]) -> None:
        """Log which of the claimed partitions were halted when this process last had them."""
        resumed = self._logged.keys() & set(claimed)
        if resumed:
            log.info("partitions_resumed", partitions=_names(resumed))
        for partition in resumed:
            del self._logged[partition]


def _names(partitions: Iterable[Partition]) -> list[str]:
    return [str(partition) for partition in sorted(partitions)]
