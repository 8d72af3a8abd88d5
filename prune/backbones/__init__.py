"""Architectures that can be pruned, one file each."""
