"""Quantization algorithms: matrices in, integers, scales and zeros out. Knows no model."""
