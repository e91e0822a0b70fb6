"""Schema, rights and views of the database, and what others put on our tables."""

__all__ = ["bookkeeping", "drift", "migrate", "objects", "revisions", "roles"]
