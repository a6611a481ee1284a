"""Searching architectures: spaces, searches with a budget, and scores that need no training."""
