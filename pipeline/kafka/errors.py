"""The error codes of Kafka's client that we tell apart."""

from confluent_kafka import KafkaError

FENCED = {KafkaError.FENCED_INSTANCE_ID, KafkaError._FENCED}  # noqa: SLF001 - public
LOGIN_REFUSED = frozenset(
    {KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED}  # noqa: SLF001 - public
)
OUT_OF_RANGE = frozenset(
    {
        KafkaError._AUTO_OFFSET_RESET,  # noqa: SLF001 - public, as are all that begin so
        KafkaError._LOG_TRUNCATION,  # noqa: SLF001
        KafkaError.OFFSET_OUT_OF_RANGE,
    }
)
NOT_FETCHING = KafkaError._STATE  # noqa: SLF001 - public
"""Seeking is refused: after an offset that Kafka does not have, the client stops fetching."""
TOPIC_ERRORS = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
    }
)
"""One topic is missing or hidden; the others are read."""
PARTITION_END = KafkaError._PARTITION_EOF  # noqa: SLF001 - public
POLLED_TOO_LATE = KafkaError._MAX_POLL_EXCEEDED  # noqa: SLF001 - public
"""The client gives its partitions up, reports them by ``on_lost``, and joins again by itself."""
VAGUE = frozenset({"_TRANSPORT", "_TIMED_OUT", "_ALL_BROKERS_DOWN", "_WAIT_COORD", "_FAIL"})
"""Names of errors that do not contain the reason."""
UNAVAILABLE = frozenset({"_TRANSPORT", "_ALL_BROKERS_DOWN"})
"""Names of errors of a connection; if one lasts, our own requests fail and are logged."""


def is_replaced(error: KafkaError) -> bool:
    """Whether another member has this member's place in the group.

    In the queue of messages a fatal error has a code of its own; only its text names the cause.
    """
    return error.code() in FENCED or (
        error.code() == KafkaError._FATAL  # noqa: SLF001 - its public name begins so
        and any(KafkaError(code).str() in error.str() for code in FENCED)
    )
