"""Speed of every op and of the whole decoder; `python benchmarks/run.py`. How it is measured: docs/benchmarks.md."""
