"""Raw files of every known format into rows, with quarantine and provenance."""
