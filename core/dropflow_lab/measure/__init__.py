"""Measurement of time, memory and FLOPs, and confidence intervals."""
