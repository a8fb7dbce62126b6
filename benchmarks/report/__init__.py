"""Tables and charts of what was measured: ``python -m benchmarks.report``."""
