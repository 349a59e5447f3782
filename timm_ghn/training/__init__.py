"""Training and evaluating GHNs."""
