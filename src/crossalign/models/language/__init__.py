"""Language models: where they lie, what they are, how they open."""
