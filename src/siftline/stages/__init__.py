"""The chain's stages: each joins what selectors decide with what models say."""
