"""DistillSpec: a draft trained on its own text by the target's judgement gets more of its drafts accepted.

Acceptance is measured where it counts: on text that the target itself writes.
"""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from claims.claim import Claim
from claims.pydoc import BATCH, data, gpt2, held_out, teacher, train
from limbeck.core.randomness import reseed
from limbeck.language.generation import generate, prompts_of
from limbeck.language.predictions import TokenReader
from limbeck.models.build import build_model
from limbeck.objectives.speculative import acceptance

WARM_UP, STEPS, PROMPT, NEW = 500, 200, 32, 24
ARMS = {
    "more text": ("next-token", {}),
    "distillspec": ("distillspec", {"prompt_tokens": PROMPT, "max_new_tokens": NEW}),
    "distillspec, TVD": ("distillspec", {"prompt_tokens": PROMPT, "max_new_tokens": NEW, "loss": "total-variation"}),
}


@cache
def target_text(seed: int) -> Any:
    """What the target writes after prompts of the held-out text."""
    reseed(seed, "target text")
    source = held_out()
    return generate(
        teacher(seed).model, prompts_of(source.fetch(torch.arange(len(source))), PROMPT), max_new_tokens=NEW, eos=()
    )


def accepted(draft: Any, seed: int) -> float:
    """Share of drafted tokens that the target accepts: sum of min(p, q), the mean over the target's own text."""
    batch = target_text(seed)
    with torch.no_grad():
        sides = [TokenReader(model.eval(), batch)(batch).logits() for model in (draft, teacher(seed).model)]
    return float(acceptance(*(side.softmax(-1) for side in sides)).mean())


def run(seed: int) -> Mapping[str, float]:
    """Gain in acceptance over the draft that all arms start from."""
    start = build_model(gpt2(1, 32), data().train.info(), seed)
    train("next-token", start, None, seed, WARM_UP, 3e-3)
    before = accepted(start, seed)
    gains = {}
    for arm, (slug, options) in ARMS.items():
        draft = copy.deepcopy(start)
        train(slug, draft, teacher(seed) if slug != "next-token" else None, seed, STEPS, 1e-3, **options)
        gains[arm] = accepted(draft, seed) - before
    return gains


claim = Claim(
    slug="distillspec",
    statement="A draft distilled on its own text gains more acceptance from its target than one trained on more text.",
    metric="gain in acceptance rate",
    budget=f"{STEPS} steps of {BATCH} sequences after {WARM_UP} on text, AdamW at 0.001; GPT-2 1x32 from 3x96",
    claimed="distillspec",
    baseline="more text",
    margin=0.02,
    run=run,
    seeds=3,
)
