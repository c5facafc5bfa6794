"""Datasets as plain iterables: where images come from, how they are split, changed and batched."""
