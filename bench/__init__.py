"""Measurements against kernel swap, and the demonstration."""
