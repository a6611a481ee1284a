"""A converted language model against its original: speed of reading and of writing, and memory of the cache, by length.

Attention reads in time that grows with the square of the length and keeps keys and values of every token; a discrete
Mamba-2 mixer reads in time that grows with the length, and writes each token from a state of constant size. Weights are
untrained, which changes none of this. Ratios above 1 are in favour of the converted model.

Run: python benchmarks/converted.py [--csv benchmarks/results.csv]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.language.conversion import convert
from limbeck.models.adapters.converted import cache_bytes
from results import append_row

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
NEW, LAYERS, WIDTH, HEADS, STATE, VOCAB = 16, 4, 256, 4, 64, 1024


def models() -> tuple[nn.Module, nn.Module]:
    """A Llama, and the same with mixers in place of all attentions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=2 * max(LENGTHS), **shape, **heads)
    original = LlamaForCausalLM(config).eval()
    return original, convert(copy.deepcopy(original), "discrete-mamba2", {"state": STATE}).eval()


def read(model: Any, ids: torch.Tensor) -> Any:
    """The prompt at once; returns the cache."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def write(model: Any, cache: Any) -> None:
    """Further tokens, one by one."""
    token = torch.ones(1, 1, dtype=torch.long)
    for _ in range(NEW):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)


def seconds(works: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The median of each, measured in turn, so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for found, work in zip(times, works, strict=True):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


@torch.no_grad()
def main() -> None:
    """Measures every length and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    table = parser.parse_args().csv
    torch.set_num_threads(1)
    pair = models()
    for model in pair:  # first runs allocate
        write(model, read(model, torch.ones(1, 64, dtype=torch.long)))
    for length in LENGTHS:
        ids = torch.randint(VOCAB, (1, length))
        repeats = 7 if length <= 1024 else 3
        reading = [length / spent for spent in seconds([partial(read, model, ids) for model in pair], repeats)]
        caches = [read(model, ids) for model in pair]
        held = [cache_bytes(cache) / 2**20 for cache in caches]
        # Each run goes on from the last: NEW more tokens of context, next to nothing beside the length.
        runs = [partial(write, model, cache) for model, cache in zip(pair, caches, strict=True)]
        writing = [NEW / spent for spent in seconds(runs, 7)]
        print(
            f"{length:6d} tokens: reads {reading[1]:8.0f} against {reading[0]:8.0f} tokens/s, "
            f"writes {writing[1]:6.1f} against {writing[0]:6.1f} tokens/s, "
            f"holds {held[1]:6.3f} against {held[0]:6.3f} MiB"
        )
        record(table, "converted-reading", length, reading, "tokens/s")
        record(table, "converted-writing", length, writing, "tokens/s")
        record(table, "converted-cache", length, held, "MiB")


def record(table: Path | None, benchmark: str, length: int, values: list[float], unit: str) -> None:
    """One row; `values` are the original's and the converted model's."""
    peer, ours = values
    ratio = peer / ours if unit == "MiB" else ours / peer
    append_row(table, benchmark, f"converted against original, {length} tokens", ours, peer, ratio, unit)


if __name__ == "__main__":
    main()
