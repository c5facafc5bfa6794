"""``measure``: how aligned language and vision models are."""
