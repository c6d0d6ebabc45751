"""Scores of a model on a split with masks."""
