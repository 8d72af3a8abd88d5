"""Refit weights or gates of a pruned model so that it gives back what the dense model gives."""
