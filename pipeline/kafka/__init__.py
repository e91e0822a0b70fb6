"""Kafka: our membership in the consumer group, and requests to the brokers.

The only package of the pipeline that imports the Kafka client. Kafka's committed offsets are
written for monitoring and never decide where to read; ``auto.offset.reset`` is always ``error``.
"""

__all__ = ["access", "consumer", "group", "metadata", "records", "reports", "version"]
