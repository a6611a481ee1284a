"""Data that are trained: synthetic sets, what they are matched by, and how they are augmented. Torch only."""
