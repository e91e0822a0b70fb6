"""Every setting: what there is, its bounds, and the places it is read from."""

from pipeline.settings.fields import KafkaClientConfig, Settings
from pipeline.settings.places import load_settings

__all__ = ["KafkaClientConfig", "Settings", "load_settings"]
