"""Everything that touches a model: engines, likelihood, embeddings, verifiers."""
