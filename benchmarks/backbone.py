"""What distribution matching holds with one frozen backbone, low-rank student and low-rank fake score, against three
whole networks: bytes of weights, gradients and optimizer states after a round of training, on a diffusers UNet.

Run: python benchmarks/backbone.py [--csv benchmarks/results.csv]
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from consistency import BATCH, LR, STEPS
from distribution import RATIO, SCALE
from limbeck.core.method import Method
from limbeck.core.registry import method_class
from limbeck.core.specs import AdapterSpec, OptimizerSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher
from limbeck.core.trainer import Trainer
from limbeck.data.loader import Loader
from limbeck.data.source import ArraySource
from limbeck.diffusion.denoiser import Process, Sampling, note_process
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.schedules import VPDiscrete
from limbeck.models.adapters.peft import add_adapter
from limbeck.models.structure import share_frozen
from results import append_row, machine


def unet() -> nn.Module:
    """A UNet large enough for its weights to count."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )


def held(shared: bool) -> float:
    """MiB of all weights, gradients and optimizer states that a training keeps."""
    torch.manual_seed(0)
    teacher = unet()
    student: nn.Module = copy.deepcopy(teacher)
    for net in (student, teacher):
        note_process(net, Process(VPDiscrete.named(), Direct("eps"), Sampling(), null_label=10))
    images, labels = torch.rand(64, 3, 32, 32), torch.arange(64) % 10
    source = ArraySource(images, labels, classes=10, normalisation=([0.5] * 3, [0.5] * 3))
    options = {"guidance": SCALE, "gan_weight": 0.0, "critic_updates": RATIO}
    speaking = LiveTeacher(teacher)
    if shared:
        student = add_adapter(student, AdapterSpec(rank=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        share_frozen(student, teacher)
        options |= {"critic": "low-rank", "critic_rank": 8}
    kind = method_class("dmd2")
    method = kind(kind.Options(**options), student=student, teacher=speaking, data=source.info())
    assert isinstance(method, Method)
    size = max(1, BATCH // 8)
    spec = TrainSpec(steps=STEPS, batch_size=size, optimizer=OptimizerSpec(lr=LR, schedule="constant"))
    loader = Loader(source, size, seed=0)
    trainer = Trainer(method, loader, spec, steps=STEPS, items=len(source), seed=0)
    trainer.method.train()
    trainer.train_step(next(iter(loader.steps(0, 1))))
    tensors: list[Tensor] = [*teacher.parameters(), *method.parameters(), *method.critic_network.parameters()]
    for player in trainer.players.values():
        tensors += [value for state in player.optimizer.state.values() for value in state.values()]
        tensors += [torch.empty_like(parameter) for parameter in player.parameters]  # as large as their gradients
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) / 2**20


def main() -> None:
    """Prints what was measured and appends it to the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    one, three = held(shared=True), held(shared=False)
    print(f"one backbone {one:.1f} MiB, three networks {three:.1f} MiB: {three / one:.2f} times as much")
    label = "MiB of weights, gradients and optimizer, three whole networks"
    append_row(arguments.csv, "dmd2-backbone", "diffusers UNet, rank 8", one, three, three / one, label)
    print(machine())


if __name__ == "__main__":
    main()
