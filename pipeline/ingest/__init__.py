"""Loop 1: from Kafka into the log, exactly once."""

__all__ = ["process", "repeats", "service"]
