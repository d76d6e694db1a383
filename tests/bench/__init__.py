"""Benchmarks: `make bench`. Figures and what they were compared with are in docs/benchmarks.md."""
