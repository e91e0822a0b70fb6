"""The log: append-only events, the next offset of each partition, segments, gaps."""

__all__ = [
    "append",
    "claims",
    "compare",
    "copying",
    "gaps",
    "ingest_tables",
    "installation",
    "integrity",
    "intervals",
    "keying",
    "offsets",
    "origin",
    "protection",
    "ranges",
    "recent",
    "search",
    "segments",
    "watermarks",
    "workers",
]
