"""Pages, tables and pictures for a person."""
