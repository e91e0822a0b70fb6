"""A believable broker, deterministic by seed, with books to compare the read models with."""

from pipeline.simulator.books import Books, Break
from pipeline.simulator.chaos import Chaos, ChaosReport
from pipeline.simulator.records import Record
from pipeline.simulator.simulation import Simulation

__all__ = ["Books", "Break", "Chaos", "ChaosReport", "Record", "Simulation"]
