"""Trajectory, consistency and guidance distillation of diffusion models."""
