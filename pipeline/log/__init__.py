"""The log: append-only events, the next offset of each partition, segments, gaps."""
