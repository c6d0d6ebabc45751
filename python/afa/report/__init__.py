"""The report of a run: one HTML page and the tables beside it."""
