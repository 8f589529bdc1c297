"""The benchmarks of aioresult; ``python -m benchmarks --help``, and docs/benchmarks.md."""
