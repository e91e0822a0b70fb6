"""Lag, freshness, owners, problems. By SQL alone, so Kafka need not answer.

Shared by `pipeline status` and the demonstration.
"""

from pipeline.health.recent import Recent
from pipeline.health.status.queries import read_status
from pipeline.health.status.report import PartitionStatus, ProjectorStatus, Status

__all__ = ["PartitionStatus", "ProjectorStatus", "Recent", "Status", "read_status"]
