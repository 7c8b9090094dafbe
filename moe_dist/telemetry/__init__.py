"""Per-rank load records and their writers."""
