"""A read model recomputed beside the live one, and compared or reconciled with it."""

__all__ = ["rebuild", "stale"]
