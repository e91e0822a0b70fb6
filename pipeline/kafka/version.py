"""The version of Kafka's client; apart, so that ``pipeline --version`` imports nothing else."""

import confluent_kafka


def librdkafka_version() -> str:
    """The version of librdkafka, for logs and bug reports."""
    return confluent_kafka.libversion()[0]
