"""Rows: their schema, hashed files of them, what became of each, and published versions."""
