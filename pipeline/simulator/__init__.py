"""A believable broker, deterministic by seed, with books to compare the read models with."""

from pipeline.simulator.books import Books, Break
from pipeline.simulator.chaos import Chaos, ChaosReport
from pipeline.simulator.records import Keying, Record
from pipeline.simulator.simulation import Simulation

__all__ = ["Books", "Break", "Chaos", "ChaosReport", "Keying", "Record", "Simulation"]
