"""The store: scores and draws by key, written once, never computed again."""
