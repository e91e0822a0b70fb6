"""Loop 2: from the log into the read models."""
