"""Benchmarks of the operators; each validates before it times. Run from the repository's root."""
