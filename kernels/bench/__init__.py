"""Benchmarks of the kernels, each a command: `PYTHONPATH=kernels python -m bench.NAME`, from the root of the tree."""
