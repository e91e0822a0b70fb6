"""Loop 2: from the log into the read models."""

__all__ = [
    "apply",
    "checkpoints",
    "dead_letters",
    "integrity",
    "loop",
    "progress",
    "registry",
    "workers",
]
