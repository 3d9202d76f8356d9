"""Answers: the final answer of a response, and whether two are the same."""
