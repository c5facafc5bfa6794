"""``evaluate``: a language model on benchmark tasks."""
