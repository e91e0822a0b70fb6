"""Side-by-side measurements: the pipeline against the bare statements that do the same work.

``python -m benchmarks`` starts a PostgreSQL and an Apache Kafka of its own, loads topics, and
prints one report. Both sides of a pair run in turn on the same servers, over the same rows, and
must leave the same rows. Times are reported, never asserted.
"""
