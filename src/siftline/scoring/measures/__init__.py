"""Measures: what is asked of a model about a row."""
