"""Tiny data, teachers and students, one rig a task: what the contract suite trains every method on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import call, logits_of
from limbeck.core.checkpoint import Checkpoints
from limbeck.core.method import Method
from limbeck.core.randomness import reseed
from limbeck.core.registry import MethodClass
from limbeck.core.specs import OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.core.trainer import Row, Trainer
from limbeck.data.loader import Loader
from limbeck.data.source import ArraySource, Source
from limbeck.data.text.source import TextSource
from limbeck.diffusion.denoiser import Process, Sampling, condition_of, denoiser_of, note_process
from limbeck.diffusion.generation import generate
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.schedules import Cosine
from limbeck.metrics.generation import noise_for
from limbeck.models.convnet import ConvNet
from limbeck.models.denoising_mlp import DenoisingMLP
from limbeck.models.experts import Experts
from limbeck.models.scenes import GaussianScenes, VoxelScenes
from limbeck.models.synthetic import SyntheticImages
from limbeck.rendering.particles import all_around


class Rig(ABC):
    """What the methods of one task are tried on; a new task adds a subclass to `RIGS`.

    Attributes:
        source: a few dozen items.
    """

    source: Source

    @abstractmethod
    def student(self, per_item: bool) -> nn.Module:
        """A fresh student from torch's stream; `per_item` without layers that tie the items of a batch together."""

    @abstractmethod
    def teacher(self) -> nn.Module:
        """A fresh teacher from torch's stream, with buffers that a train mode would move."""

    def teacher_of(self, kind: MethodClass) -> nn.Module:
        """A fresh teacher for one method; most methods of a task share what `teacher` makes."""
        return self.teacher()

    def student_of(self, kind: MethodClass, per_item: bool) -> nn.Module:
        """A fresh student for one method; most methods of a task share what `student` makes."""
        return self.student(per_item)

    def speaking(self, teacher: nn.Module) -> Teacher:
        """The teacher as methods hear it."""
        return LiveTeacher(teacher)

    def method(self, kind: MethodClass, seed: int = 0, per_item: bool = False) -> Method:
        """A method with the tiny options of its card, everything fresh from the seed."""
        card = kind.card
        reseed(seed, "models")
        teacher = self.speaking(self.teacher_of(kind)) if "teacher" in card.needs else None
        student = self.student_of(kind, per_item)
        made = kind(kind.Options(**card.tiny), student=student, teacher=teacher, data=self.source.info())
        assert isinstance(made, Method)
        return made

    def trainer(
        self,
        method: Method,
        seed: int = 0,
        *,
        steps: int = 3,
        accumulate: int = 1,
        rows: list[Row] | None = None,
        folder: Path | None = None,
        **spec: Any,
    ) -> Trainer:
        """A trainer with batches of eight that logs every step."""
        precise = next(method.student.parameters()).dtype
        return Trainer(
            method,
            Cast(Loader(self.source, 8, seed, accumulate=accumulate), precise),
            TrainSpec(steps=steps, batch_size=8, accumulate=accumulate, log_every=1, checkpoint_every=2, **spec),
            steps=steps,
            items=len(self.source),
            seed=seed,
            record=(rows if rows is not None else []).append,
            checkpoints=None if folder is None else Checkpoints(folder),
        )

    def outputs(self, model: nn.Module) -> Tensor:
        """What a result makes of the data, in eval mode."""
        with torch.no_grad():
            return model.eval()(self.source.fetch(torch.arange(8)).image)


class Cast:
    """A loader whose floating-point tensors come in another precision."""

    def __init__(self, loader: Loader, dtype: torch.dtype) -> None:
        self.loader, self.dtype = loader, dtype

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """See `Loader.steps`."""
        for micro_batches in self.loader.steps(start, stop):
            yield [Batch({name: self._cast(value) for name, value in batch.items()}) for batch in micro_batches]

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value


class Classification(Rig):
    """Digits-like images and convolutional networks."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        images = torch.rand(40, 1, 8, 8, generator=draws)
        labels = torch.arange(40) % 10
        labels[::7] = -100  # unevenly many a micro-batch
        self.source = ArraySource(images, labels)

    def student(self, per_item: bool) -> nn.Module:
        return ConvNet(width=4, depth=3, norm="none" if per_item else "batch")

    def teacher(self) -> nn.Module:
        return ConvNet(width=6, depth=3)


class TwiceTokenised(TextSource):
    """Text whose items come in a second tokenisation too, the teacher's, as methods across tokenizers need it."""

    def __init__(self, *arguments: Any, second: TextSource, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.second = second

    def fetch(self, indices: Tensor, seed: int | None = None) -> Batch:
        fields = ("input_ids", "attention_mask", "labels")
        theirs, ours = self.second.fetch(indices), super().fetch(indices)
        # Where each token ends in the text: every byte is a token here, or every second one.
        ends = {"ends": torch.arange(ours.labels.shape[1]) * 2, "teacher_ends": torch.arange(theirs.labels.shape[1])}
        rows = {name: places.expand(len(indices), -1) for name, places in ends.items()}
        return ours.replace(**{f"teacher_{name}": theirs[name] for name in fields}, **rows)


class LanguageModelling(Rig):
    """Prompts with completions of uneven length, and models of another architecture than their teachers."""

    # The end token pads too, and predictions are far from uniform.
    tokens: ClassVar = {
        "vocab_size": 50,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.3,
    }

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)

        def text(length: int) -> dict[str, Tensor]:
            ids = torch.randint(2, 50, (40, length), generator=draws)
            lengths = torch.randint(length // 2 + 1, length + 1, (40,), generator=draws)
            ids[torch.arange(40), lengths - 1] = 1  # closed by the end token
            prompts = torch.randint(2, length // 2, (40, 1), generator=draws)
            return {"ids": ids, "lengths": lengths, "targets": torch.arange(length) >= prompts}

        self.source = TwiceTokenised(**text(10), vocab=50, second=TextSource(**text(16), vocab=50))

    def student(self, per_item: bool) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0 if per_item else 0.1)
        return GPT2LMHeadModel(GPT2Config(**self.tokens, **shape, **dropout))

    def student_of(self, kind: MethodClass, per_item: bool) -> nn.Module:
        """What a conversion starts from has the teacher's own architecture."""
        return self._llama(0.0 if per_item else 0.1) if kind.card.family == "conversion" else self.student(per_item)

    def teacher(self) -> nn.Module:
        return self._llama(0.1)

    def _llama(self, dropout: float) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 32}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_dropout": dropout}
        return LlamaForCausalLM(LlamaConfig(**self.tokens, **shape, **heads))

    def outputs(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return logits_of(call(model.eval(), self.source.fetch(torch.arange(8))))


class Generation(Rig):
    """Digits-like images in [-1, 1] with classes, and small denoisers; the teacher knows how to do without a class."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        images = torch.rand(40, 1, 4, 4, generator=draws)
        labels = torch.arange(40) % 4
        labels[::7] = -100
        self.source = ArraySource(images, labels, normalisation=([0.5], [0.5]))

    def student(self, per_item: bool) -> nn.Module:
        return DenoisingMLP(numbers=16, classes=4, width=16, depth=2)

    def teacher(self) -> nn.Module:
        process = Process(Cosine(), Direct("v"), Sampling("ddim", 8, 2.0), null_label=4)
        return note_process(DenoisingMLP(numbers=16, classes=4, width=24, depth=2), process)

    def outputs(self, model: nn.Module) -> Tensor:
        batch = self.source.fetch(torch.arange(8))
        with torch.no_grad():
            return generate(denoiser_of(model.eval()), noise_for(batch), condition_of(batch, 4), solver="ddim")


class Scenes(Generation):
    """Two particles of a small scene, pushed by a denoiser of gray images of a few pixels."""

    def student(self, per_item: bool) -> nn.Module:
        # A field in training looks at random places of a ray, by the global stream; Gaussians draw nothing.
        if per_item:
            return GaussianScenes(particles=2, count=6)
        return VoxelScenes(particles=2, resolution=4, samples=6)

    def outputs(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return all_around(model.eval(), 3, 4, 4)


class Sets(Classification):
    """Two images a class, begun from the same digits-like images; the teacher classifies these."""

    def student(self, per_item: bool) -> nn.Module:
        made = SyntheticImages(height=8, width=8, per_class=2)
        made.begin(self.source, int(torch.randint(1000, ())))
        return made

    def teacher_of(self, kind: MethodClass) -> nn.Module:
        if kind.card.slug not in ("mtt", "ftd"):
            return self.teacher()
        experts = Experts(channels=1, height=8, side=8, width=4, depth=2, norm="batch", experts=2, epochs=3)
        experts.snapshots.copy_(0.1 * torch.randn(experts.snapshots.shape))
        return experts

    def outputs(self, model: nn.Module) -> Tensor:
        images, labels = model()
        return torch.cat([images.detach().flatten(), labels.flatten()])


RIGS: dict[str, Rig] = {
    "classification": Classification(),
    "dataset": Sets(),
    "generation": Generation(),
    "language-modelling": LanguageModelling(),
    "scene": Scenes(),
}
"""One rig by `Card.task`."""

SGD = OptimizerSpec(name="sgd", lr=1e-3, momentum=0.9, schedule="constant")


def rig_of(kind: MethodClass) -> Rig:
    """The rig of a method's task."""
    assert kind.card.task in RIGS, f"task '{kind.card.task}' of '{kind.card.slug}' has no rig yet: add one to RIGS"
    return RIGS[kind.card.task]
