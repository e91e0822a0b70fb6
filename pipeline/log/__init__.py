"""The log: append-only events, the next offset of each partition, segments, gaps."""

__all__ = [
    "append",
    "compare",
    "copying",
    "gaps",
    "installation",
    "integrity",
    "intervals",
    "keying",
    "offsets",
    "origin",
    "search",
    "segments",
    "watermarks",
    "workers",
]
