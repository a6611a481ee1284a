"""SparseGPT: making up for what is pruned keeps a language model's predictions where choosing alone does not.

No weight is trained afterwards. Sparsity and margins were fixed on seed 10, where at a half, three fifths and three
quarters of zeros magnitude lost 0.024, 0.058 and 0.164 nats and SparseGPT 0.011, 0.030 and 0.118.
"""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from claims.claim import Claim
from claims.pydoc import data, figures, teacher
from limbeck.core.method import ProcedureContext
from limbeck.methods.conversion.prune import Prune

SPARSITY, ITEMS = 0.6, 128


def run(seed: int) -> Mapping[str, float]:
    """Held-out cross-entropy above the dense network's, by what the pruned weights were judged by."""
    dense = teacher(seed)
    floor = figures(dense.model, dense)["cross_entropy"]
    arms = {"magnitude": "magnitude", "Wanda": "wanda", "SparseGPT": "obs"}
    return {arm: figures(pruned(dense.model, seed, criterion), dense)["cross_entropy"] - floor
            for arm, criterion in arms.items()}  # fmt: skip


def pruned(network: nn.Module, seed: int, criterion: str) -> nn.Module:
    """A pruned copy; all arms see the same calibration texts."""
    options = Prune.Options(criterion=criterion, sparsity=SPARSITY, calibration_items=ITEMS)
    procedure = Prune(options, student=copy.deepcopy(network), data=data().train.info())
    nothing = lambda *words: None  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        return procedure.run(ProcedureContext(data().train, Path(folder), seed, nothing, nothing))


claim = Claim(
    slug="prune",
    statement="With three fifths of every layer's weights at zero and no training afterwards, SparseGPT loses less "
    "than pruning by magnitude does, and less than Wanda.",
    metric="held-out cross-entropy above the dense network's (nats a token)",
    budget=f"GPT-2 3x96 trained for 500 steps; {ITEMS} sequences of 64 tokens to judge by",
    claimed="SparseGPT",
    baseline="magnitude",
    margin=0.015,
    also={"Wanda": 0.008},
    run=run,
    higher_is_better=False,
    seeds=3,
)
