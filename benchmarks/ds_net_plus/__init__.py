"""Benchmarks of ds-net-plus."""
