"""Kafka: which partitions are ours, what is in them, from where on.

The only package of the pipeline that imports the Kafka client. Kafka's committed offsets are
written for monitoring and never read to decide where to go on; ``auto.offset.reset`` is ``error``,
always.
"""

from pipeline.source.access import (
    Access,
    right_to_ask_for,
    user_of,
    why_not_readable,
    why_not_visible,
)
from pipeline.source.brokers import Brokers, Fed, Member, Piece, Watermarks
from pipeline.source.client import client_version
from pipeline.source.group import KafkaSource, Listener, OutOfRange, Polled, ReachedEnd

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
