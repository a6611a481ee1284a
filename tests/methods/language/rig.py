"""Tiny language models and a batch, on which the loss of a method is worked out by hand."""

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.method import Clock, DataInfo, Method, TextInfo, Update
from limbeck.core.randomness import reseed
from limbeck.core.registry import method_class
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.core.trainer import Row, Trainer
from limbeck.data.loader import Loader
from limbeck.data.text.source import TextSource

VOCAB, END, LENGTH, ITEMS = 40, 1, 12, 24


def source(items: int = ITEMS, seed: int = 3) -> TextSource:
    """Prompts of 2 to 4 tokens, and completions of uneven length that close with the end token, the padding's id."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (items, LENGTH), generator=draws)
    lengths = torch.randint(6, LENGTH + 1, (items,), generator=draws)
    ids[torch.arange(items), lengths - 1] = END
    ids[torch.arange(LENGTH) >= lengths[:, None]] = END
    prompts = torch.randint(2, 5, (items, 1), generator=draws)
    return TextSource(ids, lengths, torch.arange(LENGTH) >= prompts, vocab=VOCAB)


def batch(items: int = 5) -> Batch:
    """The first items."""
    return source().fetch(torch.arange(items))


def gpt2(seed: int = 2, **changes: Any) -> nn.Module:
    """A GPT-2 whose predictions are far from uniform, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    settings = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
    settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.4}
    settings |= {"bos_token_id": 0, "eos_token_id": END, "pad_token_id": END}
    return GPT2LMHeadModel(GPT2Config(**{**settings, **changes}))


def llama(seed: int = 1, **changes: Any) -> nn.Module:
    """A Llama, the usual teacher here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 40}
    settings |= {"bos_token_id": 0, "eos_token_id": END, "pad_token_id": END, "initializer_range": 0.4}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


class Headless(nn.Module):
    """A model that shows no output head, so that its logits have to be computed in full."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits


def build(
    slug: str,
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | Teacher | None = None,
    info: DataInfo | None = None,
    **options: Any,
) -> Method:
    """A method in train mode, half-way through its first of two epochs."""
    kind = method_class(slug)
    teacher = teacher if teacher is not None else llama()
    live = LiveTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
    torch.manual_seed(5)
    info = info or DataInfo(ITEMS, 0, batch(2), TextInfo(VOCAB))
    method = kind(kind.Options(**options), student=student or gpt2(), teacher=live, data=info)
    method.clock = Clock(step=5, steps=20, epoch=0.5)
    return method.train()


def update_of(method: Method, items: Batch | None = None, seed: int = 7) -> Update:
    """The one update of a step."""
    reseed(seed)
    (update,) = list(method.step(items or batch()))
    return update


def logits(model: nn.Module, items: Batch | None = None) -> Tensor:
    """A model's logits (tokens, vocab) at the tokens that count, from its plain forward pass."""
    items = items or batch()
    counted = items.labels[:, 1:] != -100
    return logits_of(call(model, items))[:, :-1][counted]


def targets(items: Batch | None = None) -> Tensor:
    """Ids of the tokens that count."""
    labels = (items or batch()).labels[:, 1:]
    return labels[labels != -100]


def both(method: Method, items: Batch | None = None) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher at the tokens that count."""
    with torch.no_grad():
        theirs = logits(method.teacher.model, items)
    return logits(method.student, items), theirs


def check_gradients(method: Method, loss: Tensor) -> None:
    """The gradient reaches all of the student and leaves the teacher alone."""
    loss.backward()
    for name, parameter in method.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert method.student.get_input_embeddings().weight.grad.abs().sum() > 0
    for parameter in method.teacher.model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def trainer(
    method: Method,
    *,
    steps: int = 3,
    accumulate: int = 1,
    batch_size: int = 8,
    rows: list[Row] | None = None,
    optimizer: OptimizerSpec | None = None,
    **options: Any,
) -> Trainer:
    """A trainer on `source()`."""
    spec = TrainSpec(
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        log_every=1,
        optimizer=optimizer or OptimizerSpec(name="sgd", lr=0.01, schedule="constant"),
    )
    loader = Loader(source(), batch_size, 0, accumulate=accumulate)
    record = (rows if rows is not None else []).append
    return Trainer(method, loader, spec, steps=steps, items=ITEMS, seed=0, record=record, **options)


def weights(module: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([parameter.detach().flatten().double() for parameter in module.parameters()])
