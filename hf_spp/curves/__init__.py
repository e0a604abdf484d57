"""Curves of quality against cost: what each width of a reordered model is worth, and cutting the one that is wanted."""
