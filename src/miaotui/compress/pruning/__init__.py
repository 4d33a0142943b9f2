"""Pruning: single weights set to 0, or whole parts of a model cut out."""
