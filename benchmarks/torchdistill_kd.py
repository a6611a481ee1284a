"""One epoch of Hinton's distillation against torchdistill on the same nets, data and optimizer.

torchdistill is no dependency: `pip install --no-deps --target DIR torchdistill`, then
PYTHONPATH=DIR python benchmarks/torchdistill_kd.py [--csv benchmarks/results.csv] [--data-dir DIR]
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler, TensorDataset

from limbeck.core.specs import ModelSpec
from limbeck.data.source import Source
from limbeck.models.build import build_model
from results import append_row, machine
from trainer import BATCH, LR, cases, compare, ours


def theirs(student: nn.Module, teacher: nn.Module, source: Source) -> Callable[[], None]:
    """One step of torchdistill's box: its loader, forward passes, loss and update."""
    from torchdistill.core.distillation import DistillationBox

    batch = source.fetch(torch.arange(len(source)))
    config: dict[str, Any] = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": BATCH, "num_workers": 0, "drop_last": True},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": LR, "weight_decay": 0.0}, "max_grad_norm": 1.0},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {
                                "student_module_path": ".",
                                "student_module_io": "output",
                                "teacher_module_path": ".",
                                "teacher_module_io": "output",
                                "temperature": 4.0,
                                "alpha": 0.1,
                                "reduction": "batchmean",
                            },
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }
    data = {"train": TensorDataset(batch.image, batch.label)}
    box = DistillationBox(teacher, student, data, config, torch.device("cpu"), None, False, 1.0)
    box.pre_epoch_process()
    batches = forever(box)

    def step() -> None:
        images, labels, extra = next(batches)
        loss = box.forward_process(images, labels, extra)
        box.post_forward_process(loss)

    return step


def forever(box: Any) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """The box's batches, epoch after epoch."""
    while True:
        yield from box.train_data_loader


def main() -> None:
    """Prints a line a case and appends it to the table; does nothing where torchdistill is not installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    if importlib.util.find_spec("torchdistill") is None:
        print("torchdistill is not installed: nothing is compared")
        return
    for name, (source, model, options, block, rounds) in cases(arguments.data_dir).items():
        nets = [build_model(ModelSpec(name=model, arguments=options), source.info(), seed) for seed in (0, 0, 1, 1)]
        steps = ours(nets[0], nets[2], source), theirs(nets[1], nets[3], source)
        mine, peer, ratio = compare(*steps, block, rounds)
        print(
            f"{name}: {mine * 1e3:.3f} ms against torchdistill's {peer * 1e3:.3f} ms a step, {ratio:.3f} times as fast"
        )
        append_row(arguments.csv, "kd-step", name, mine * 1e3, peer * 1e3, ratio, "ms a step, torchdistill")
    print(machine())


if __name__ == "__main__":
    main()
