"""Sets: shingles, signatures, bands, groups of near copies."""
