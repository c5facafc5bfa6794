"""``adapt`` and ``predict``: a language model becomes an image classifier."""
