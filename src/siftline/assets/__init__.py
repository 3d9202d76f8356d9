"""Thin Dagster assets: read, call one function, write, return metadata."""

import gc

import dagster  # noqa: F401

# What dagster has made stays for good: without this, composing the assets of all recipes walks it
# a dozen times, a tenth of the time that importing the definitions takes.
gc.freeze()
