"""Moesaic: distributed Mixture-of-Experts training, one code path from a laptop without a GPU to a cluster."""

__version__ = "0.1.0"
