"""Measures the norms against torch's LayerNorm: ``python scripts/benchmark.py``."""
