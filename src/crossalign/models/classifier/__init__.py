"""The adapted model: an embedder and a head round a language model."""
