"""Kafka: which partitions are ours, what is in them, from where on.

The only package of the pipeline that imports the Kafka client. Kafka's committed offsets are
written for monitoring and never read to decide where to go on; ``auto.offset.reset`` is ``error``,
always.
"""

from pipeline.kafka.access import (
    Access,
    right_to_ask_for,
    user_of,
    why_not_readable,
    why_not_visible,
)
from pipeline.kafka.client import client_version
from pipeline.kafka.consumer import KafkaSource, Listener, OutOfRange, Polled, ReachedEnd
from pipeline.kafka.metadata import Brokers, Fed, Member, Piece, Watermarks

__all__ = [
    "Access",
    "Brokers",
    "Fed",
    "KafkaSource",
    "Listener",
    "Member",
    "OutOfRange",
    "Piece",
    "Polled",
    "ReachedEnd",
    "Watermarks",
    "client_version",
    "right_to_ask_for",
    "user_of",
    "why_not_readable",
    "why_not_visible",
]
