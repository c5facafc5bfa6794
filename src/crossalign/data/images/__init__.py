"""Labelled images: listed, decoded, split three ways, augmented."""
