"""Results and model cards: rows, tables, plots, headers, cards of folders."""
