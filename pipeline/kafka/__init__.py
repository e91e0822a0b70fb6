"""Kafka: our membership in the consumer group, and requests to the brokers.

The only package of the pipeline that imports the Kafka client. Kafka's committed offsets are
written for monitoring and never decide where to read; ``auto.offset.reset`` is always ``error``.
"""

from pipeline.kafka.access import (
    Access,
    right_to_request,
    user_of,
    why_not_readable,
    why_not_visible,
)
from pipeline.kafka.consumer import (
    GroupConsumer,
    OutOfRange,
    Polled,
    ReachedEnd,
    RebalanceListener,
)
from pipeline.kafka.errors import client_created, on_client_error, translated
from pipeline.kafka.group import ConsumerGroup, GroupCommit, Member
from pipeline.kafka.metadata import Brokers
from pipeline.kafka.records import RecordBatch, RecordReader, Watermarks

__all__ = [
    "Access",
    "Brokers",
    "ConsumerGroup",
    "GroupCommit",
    "GroupConsumer",
    "Member",
    "OutOfRange",
    "Polled",
    "ReachedEnd",
    "RebalanceListener",
    "RecordBatch",
    "RecordReader",
    "Watermarks",
    "client_created",
    "on_client_error",
    "right_to_request",
    "translated",
    "user_of",
    "why_not_readable",
    "why_not_visible",
]
