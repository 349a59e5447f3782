"""What predicted weights are worth, measured."""
