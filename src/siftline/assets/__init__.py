"""Thin Dagster assets: read, call one function, write, return metadata."""
