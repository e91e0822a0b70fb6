"""The tests, and the servers that they and the benchmarks run on."""
