"""The kernel: methods, trainer, teachers, taps, recipes, run folders and checkpoints."""
