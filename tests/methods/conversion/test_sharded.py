"""Conversions whose weights are spread over two processes (FSDP2 over gloo)."""

import pytest
import torch

from limbeck.core.distributed import World
from tests.core.test_distributed import launch, relative
from tests.methods.conversion.ranks import GROWING, training


def test_masks_of_sharded_weights_are_those_of_one_process(tmp_path):
    """One launch for what works and what is refused, since imports dominate."""
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    launch(str(tmp_path), program="tests.methods.conversion.ranks", **variables)
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    method, trainer = training("squarehead", World(), **GROWING)
    alone = trainer.fit().state_dict()
    for name, mask in method.masks.state_dict().items():
        assert torch.equal(mask, found["masks"][name]), name
    for name in method.masks.names:
        assert not found["weights"][name][~method.masks[name]].any()
    together = torch.cat([found["weights"][name].flatten() for name in alone])
    assert relative(together, torch.cat([value.flatten() for value in alone.values()])) < 1e-5
    sparsity = float(torch.load(tmp_path / "sparsity.pt", weights_only=True))
    assert sparsity == pytest.approx(method.figures()["sparsity"])
    assert sparsity == pytest.approx(0.7, abs=0.01)
