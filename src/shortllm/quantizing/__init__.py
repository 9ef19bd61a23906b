"""Quantization after shortening: fewer bits for the weights that are left."""
