"""Near-duplicate removal over tables and files: the engine behind `siftline dedup` on texts."""
