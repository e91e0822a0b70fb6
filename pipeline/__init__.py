"""Upvest's Kafka events, exactly once, in PostgreSQL: an append-only log and read models."""

# The one place the version is written; the build reads it from here.
__version__ = "0.1.0"
