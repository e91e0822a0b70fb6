"""Servers that the program runs by itself, for the demo and the tests; never for production."""
