"""Networks and their weights: everything that owns parameters."""
