"""Distillation of diffusion models into scenes and images, whose renderings are pushed to what it expects."""
