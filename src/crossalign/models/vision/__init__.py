"""Vision models whose features others are pulled towards."""
