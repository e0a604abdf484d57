"""Which channels may move in which family of models: the shipped table, and the survey that writes it."""
