"""Runs the whole suite with shape and type checks on the pure functions, and on one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

CHECKED = ["limbeck.compression", "limbeck.diffusion", "limbeck.objectives", "limbeck.rendering", "limbeck.synthesis"]
install_import_hook(CHECKED, "beartype.beartype")

import torch

torch.set_num_threads(1)
