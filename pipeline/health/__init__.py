"""What people ask of a running installation: `status`, `check` and `verify`."""
