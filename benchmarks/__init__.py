"""Measurements: the check on a GPU, the benchmark suites, and what they share."""
