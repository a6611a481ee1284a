"""Distillation of diffusion models by matching distributions: two scores, and games between networks."""
