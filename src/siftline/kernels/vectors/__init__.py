"""Vectors: clusters, neighbours, coverage, transport."""
