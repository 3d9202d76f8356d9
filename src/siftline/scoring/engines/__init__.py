"""Engines: what runs a model, behind one protocol."""
