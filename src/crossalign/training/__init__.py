"""One training loop for every recipe, and what it stands on: precision, checkpoints, records."""
