"""Training GHNs."""
