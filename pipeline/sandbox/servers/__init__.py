"""Servers that the program runs by itself, for the demo and the tests; never for production."""

__all__ = ["broker", "guard", "postgres"]
