"""Texts: words, folds, signs, numbers."""
