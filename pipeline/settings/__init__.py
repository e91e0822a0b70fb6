"""Every setting: what there is, its bounds, and its sources."""

from pipeline.settings.fields import KafkaClientConfig, Settings
from pipeline.settings.sources import load_settings

__all__ = [
    "KafkaClientConfig",
    "Settings",
    "fields",
    "load_settings",
]
