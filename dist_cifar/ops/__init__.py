"""Fused CPU kernels, precision, random numbers: speed, never meaning. Models do not know them."""
