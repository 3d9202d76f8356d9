"""Versions of what computes numbers, as plain constants: no model library is loaded to read them.

Raise one when a change of its module changes numbers beyond rounding. It is in the engine's
fingerprint, so stored scores go stale, and in what tables and stages are made of, so these do.
"""

TRANSFORMERS = 2
VLLM = 1
SERVER = 1
CLASSIFIER = 1
EMBEDDER = 1

ENGINES = {
    "transformers": {"scores": TRANSFORMERS, "classifier": CLASSIFIER, "embedder": EMBEDDER},
    "vllm": {"scores": VLLM},
    "server": {"scores": SERVER},
    "sentence-transformers": {"embedder": EMBEDDER},
}
"""What a model of a recipe may run as, by the name of its engine."""
