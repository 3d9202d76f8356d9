"""Everything that touches a model: engines, likelihood, embeddings, verifiers."""

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
