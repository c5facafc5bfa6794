"""The numbers of many runs, and how surely they differ."""
