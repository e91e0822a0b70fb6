"""What people try first: the simulator, servers that need no installation, the demo."""

__all__ = ["demo", "simulator"]
