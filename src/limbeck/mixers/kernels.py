"""Other packages' GPU kernels for the scans: when they are used, and how they are called.

`mamba_ssm` (Gu and Dao) and `fla`, flash-linear-attention (Yang and Zhang), are imported when first asked for. Neither
takes float64, and neither runs on a CPU.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "mamba_ssm", "fla"]
"""`auto`: on a GPU the first kernel that is installed and supports the case, else `torch`, which is this package's."""

SMALLEST_DECAY = 1e-6
"""mamba_ssm multiplies inputs by what the decay is made of; dividing by less than this would lose them."""


def choose(backend: str, device: torch.device, supports: Mapping[str, bool]) -> str:
    """The backend to use.

    Args:
        backend: what was asked for.
        device: where the tensors are.
        supports: for each kernel, the preferred first, whether it can do this case.

    Raises:
        ValueError: a kernel was asked for by name and cannot do this case.
        ImportError: a kernel was asked for by name and is not installed.
    """
    if backend == "auto":
        on_gpu = device.type == "cuda"
        return next((name for name, fits in supports.items() if on_gpu and fits and _installed(name)), "torch")
    if backend != "torch" and not supports.get(backend, False):
        raise ValueError(f"backend '{backend}' cannot do this case: use backend='torch', or 'auto' to have it chosen")
    if backend != "torch":
        importlib.import_module(backend)
    return backend


def mamba_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` by mamba_ssm: outputs and the last state, through which no gradient flows."""
    kernel = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return kernel(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=True)


def fla_ssd(
    X: Tensor, log_decay: Tensor | None, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd` without D by fla, whose states are (batch, heads, state, size)."""
    kernel = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    if "head_first" in inspect.signature(kernel).parameters:
        options["head_first"] = False
    if initial_state is not None:
        options["initial_state"] = initial_state.float().transpose(-1, -2).contiguous()
    decay = None if log_decay is None else log_decay.float()
    y, last = kernel(C.to(X.dtype), B.to(X.dtype), X, decay, **options)
    return y, last.transpose(-1, -2)


def mamba_ssd(
    X: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, block: int, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd` without D by mamba_ssm, which scales inputs by the step that also makes the decay: they are divided first.

    Decays above exp(-1e-6) become that.
    """
    kernel = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    delta = -log_decay.float().clamp(max=-SMALLEST_DECAY)
    rate = -torch.ones(X.shape[2], device=X.device)
    scaled = (X.float() / delta[..., None]).to(X.dtype)
    return kernel(
        scaled,
        delta,
        rate,
        B.to(X.dtype),
        C.to(X.dtype),
        block,
        initial_states=initial_state,
        return_final_states=True,
    )


def _installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
