"""Benchmarks: what the library claims of its speed, measured."""
