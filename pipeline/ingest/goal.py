"""What a run with ``--until-end`` waits for."""

import time
from collections.abc import Collection, Mapping

from sqlalchemy import Engine

from pipeline.db import transaction
from pipeline.kafka.metadata import Brokers
from pipeline.log import ranges
from pipeline.partitions import Partition

GOAL_CHECK_S = 1.0
"""How often the partitions of other members are checked."""


class Goal:
    """The ends that the partitions of other members must reach.

    They may be about to be assigned to us, or may be assigned to us when their owner dies. So the
    log must have what Kafka had of them when we first checked.
    """

    def __init__(self, engine: Engine, brokers: Brokers, topics: Collection[str]) -> None:
        self._engine = engine
        self._brokers = brokers
        self._topics = topics
        self._ends: Mapping[Partition, int] | None = None
        self._check_at = 0.0

    def is_reached_by_others(self, ours: Collection[Partition], absent: Collection[str]) -> bool:
        """Whether the log has everything of the partitions that are not ours.

        Args:
            ours: Partitions that are owned or halted here.
            absent: Topics that Kafka does not show.

        Raises:
            TransientError: A server is unavailable.
        """
        now = time.monotonic()
        if now < self._check_at:
            return False
        self._check_at = now + GOAL_CHECK_S
        if self._ends is None:
            partitions = {
                Partition(topic, number)
                for topic in self._topics
                if topic not in absent
                for number in range(self._brokers.partition_count(topic))
            }
            self._ends = {
                partition: self._brokers.watermarks(partition).high
                for partition in partitions.difference(ours)
            }
        others = {partition: end for partition, end in self._ends.items() if partition not in ours}
        with transaction(self._engine) as db:
            return ranges.has_reached(db, others)
