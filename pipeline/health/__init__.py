"""What people ask of a running installation: `status`, `check` and `verify`."""

__all__ = ["check", "problem", "status", "verify"]
