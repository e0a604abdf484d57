"""A page to play with: what each width of a reordered checkpoint costs, is worth and predicts."""
