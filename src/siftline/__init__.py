"""Siftline: curate instruction data, train on it, account for every row."""

__version__ = "0.1.0"
