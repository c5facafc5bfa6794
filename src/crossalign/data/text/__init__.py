"""Text to train on and to be scored on: corpora, instructions, tokens."""
