"""The demo: a day at a broker, from Kafka into tables worth querying, and faults on purpose.

An embedded PostgreSQL, a mock broker, real workers in processes of their own. All of it ends, and
its folder goes, when the demo ends, however that ends.
"""

from pipeline.sandbox.demo.scenario import DEFAULT_EVENTS, DEFAULT_SEED, run_demo

__all__ = ["DEFAULT_EVENTS", "DEFAULT_SEED", "run_demo"]
