"""Schema, rights and views of the database, and what others put on our tables."""
