"""Measure the latency table of a model on a device."""
