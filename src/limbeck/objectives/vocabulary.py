"""Vocabularies of different (padded) size over the same token ids."""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def match_vocabulary(
    student_logits: Float[Tensor, "*items student_vocab"],
    teacher_logits: Float[Tensor, "*items teacher_vocab"],
    mode: Literal["absent", "truncate", "zero"] = "absent",
) -> tuple[Float[Tensor, "*items vocab"], Float[Tensor, "*items vocab"]]:
    """Bring two logit tensors over the same leading token ids to one last dimension.

    Checkpoints pad their vocabulary differently (151,936 and 152,064 for one tokenizer). ``absent`` gives the entries
    that one side lacks the logit -inf, so that they have no probability there. ``truncate`` cuts both to the shorter;
    softmax then renormalises, and probability on the cut entries is lost. ``zero`` pads with logit 0, which invents
    probability: only there to reproduce code that does it.
    """
    student_vocab, teacher_vocab = student_logits.shape[-1], teacher_logits.shape[-1]
    if student_vocab == teacher_vocab:
        return student_logits, teacher_logits
    if mode == "truncate":
        shared = min(student_vocab, teacher_vocab)
        return student_logits[..., :shared], teacher_logits[..., :shared]
    vocab, fill = max(student_vocab, teacher_vocab), -math.inf if mode == "absent" else 0.0
    return _pad(student_logits, vocab, fill), _pad(teacher_logits, vocab, fill)


def _pad(logits: Tensor, vocab: int, fill: float) -> Tensor:
    missing = vocab - logits.shape[-1]
    return F.pad(logits, (0, missing), value=fill) if missing else logits
