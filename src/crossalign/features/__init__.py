"""Features of models, computed once and kept, and the regulariser that pulls towards them."""
