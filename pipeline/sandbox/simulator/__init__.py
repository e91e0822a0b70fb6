"""A believable broker, deterministic by seed, with books to compare the read models with."""

from pipeline.sandbox.simulator.books import Books, Break
from pipeline.sandbox.simulator.chaos import Chaos, ChaosReport
from pipeline.sandbox.simulator.records import Keying, Record
from pipeline.sandbox.simulator.simulation import Simulation

__all__ = [
    "Books",
    "Break",
    "Chaos",
    "ChaosReport",
    "Keying",
    "Record",
    "Simulation",
    "chaos",
    "producer",
]
