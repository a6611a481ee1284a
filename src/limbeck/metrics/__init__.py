"""Metrics: how good a student is, how like its teacher, what it costs, and how far a figure can be trusted."""
