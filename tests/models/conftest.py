"""Tiny pipelines of diffusers, saved once a session."""

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def stock(tmp_path_factory) -> SimpleNamespace:
    """Folders of tiny pipelines: `pixels` (unconditional), `classes` (DiT with an autoencoder), `text`."""
    from tests.models import pipelines

    pipelines.quiet()
    folder: Path = tmp_path_factory.mktemp("pipelines")
    return SimpleNamespace(
        pixels=pipelines.unconditional(folder / "pixels"),
        classes=pipelines.class_conditional_latents(folder / "classes"),
        text=pipelines.stable_diffusion(folder / "text"),
    )
