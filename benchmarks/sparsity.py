"""What zeros bring on this machine with torch's own kernels: matrix products, tokens a second, bytes on disk.

Unstructured zeros are stored as CSR; zeros that come in blocks of 16x16 as BSR; two of four, on a GPU that has sparse
matrix units, as semi-structured. Each is measured against the same weights kept dense. A ratio below 1 means that the
zeros make it slower.

Run: python benchmarks/sparsity.py [--csv benchmarks/results.csv]
"""

import argparse
import copy
import io
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.compression.masks import keep_largest
from limbeck.compression.matrices import matrix_layers
from results import append_row, machine

SIZE, SHARES, BLOCK = 1024, (0.5, 0.75, 0.9, 0.95), 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class SparseLinear(nn.Module):
    """A linear layer whose weight is kept as CSR."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.detach().to_sparse_csr(), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        out = (self.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def seconds(ours: Callable[[], object], peer: Callable[[], object], rounds: int = 15) -> tuple[float, float]:
    """Median seconds of each, measured in turn, so that a busy machine slows both alike."""
    found: tuple[list[float], list[float]] = ([], [])
    repeats = max(1, round(0.01 / max(once(peer), 1e-6)))
    for _ in range(rounds):
        for times, work in zip(found, (ours, peer), strict=True):
            times.append(once(lambda work=work: [work() for _ in range(repeats)]) / repeats)
    return statistics.median(found[0]), statistics.median(found[1])


def once(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def counted(tokens: int) -> str:
    """How many tokens, in words."""
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def named(kind: str) -> str:
    """The kind with its peer, once for all kinds: the drawing has one line for dense products."""
    return f"{kind} against dense" if kind == "CSR" else kind


def zeros(share: float) -> str:
    """A share of zeros as the end of a case."""
    return f"{100 * share:.0f} % zeros"


def benchmark(name: str, tokens: int) -> str:
    """One drawing for a single token, whose product is bound by memory, and one for many."""
    return f"{name}-token" if tokens == 1 else name


def thinned(weight: Tensor, share: float, block: int = 1) -> Tensor:
    """The weight without its smallest entries, or blocks of entries."""
    rows, columns = weight.shape
    tiles = weight.view(rows // block, block, columns // block, block)
    keep = keep_largest(tiles.abs().sum((1, 3))[None], share)[0]
    return (tiles * keep[:, None, :, None]).view(rows, columns)


def products(csv: Path | None) -> None:
    """One layer, for one token and for many."""
    weight = torch.randn(SIZE, SIZE, device=DEVICE)
    for share in SHARES:
        for tokens in (1, 64):
            x = torch.randn(tokens, SIZE, device=DEVICE)
            kinds = {"CSR": thinned(weight, share), f"BSR {BLOCK}x{BLOCK}": thinned(weight, share, BLOCK)}
            for kind, dense in kinds.items():
                made = dense.to_sparse_csr() if kind == "CSR" else dense.to_sparse_bsr((BLOCK, BLOCK))
                compare(csv, kind, share, made, dense, x)
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        half = torch.randn(SIZE, SIZE, device=DEVICE, dtype=torch.float16)
        runs = half.view(-1, 4)
        pairs = runs.scatter(1, runs.abs().argsort(1)[:, :2], 0.0).view_as(half)
        made = torch.sparse.to_sparse_semi_structured(pairs)
        compare(csv, "2:4 float16", 0.5, made, pairs, torch.randn(64, SIZE, device=DEVICE).half())


def compare(csv: Path | None, kind: str, share: float, sparse: Tensor, dense: Tensor, x: Tensor) -> None:
    """Times one product and checks that both ways give the same."""
    right = x.T.contiguous()
    torch.testing.assert_close(sparse @ right, dense @ right, rtol=1e-2, atol=1e-2)
    ours, peer = seconds(lambda: sparse @ right, lambda: dense @ right)
    case = f"{named(kind)}, {zeros(share)}"
    print(f"{len(x)}: {case}: {ours * 1e6:.0f} µs against {peer * 1e6:.0f} dense, {peer / ours:.2f} as fast")
    unit = f"µs, {counted(len(x))} through {SIZE}x{SIZE}, peer dense"
    append_row(csv, benchmark("sparse-linear", len(x)), case, ours * 1e6, peer * 1e6, peer / ours, unit)


def language_model(csv: Path | None) -> None:
    """A small Llama whose linear layers are CSR, reading 64 tokens at a time and one at a time; and its bytes."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=8, **shape)).to(DEVICE).eval()
    for share in SHARES:
        pruned = copy.deepcopy(dense)
        with torch.no_grad():
            for layer in matrix_layers(pruned).values():
                layer.weight.copy_(thinned(layer.weight, share))
        sizes(csv, pruned, share)
        sparse = copy.deepcopy(pruned)
        for path, layer in matrix_layers(pruned).items():
            sparse.set_submodule(path, SparseLinear(layer))
        for tokens in (1, 64):
            ids = torch.randint(512, (1, tokens), device=DEVICE)
            with torch.no_grad():
                torch.testing.assert_close(sparse(ids).logits, pruned(ids).logits, rtol=1e-2, atol=1e-2)
                ours, peer = seconds(lambda: sparse(ids), lambda: pruned(ids), rounds=7)  # noqa: B023
            case, speeds = f"{named('CSR')}, {zeros(share)}", (tokens / ours, tokens / peer)
            print(f"{tokens}: {case}: {speeds[0]:.0f} tokens/s against {speeds[1]:.0f}, {peer / ours:.2f} as fast")
            unit = f"tokens/s, {counted(tokens)} through a Llama 4x512"
            append_row(csv, benchmark("sparse-model", tokens), case, *speeds, peer / ours, unit)


def sizes(csv: Path | None, model: nn.Module, share: float) -> None:
    """Bytes of the file as it is, compressed, and with the layers as CSR with 32-bit indices."""
    weights = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    plain = save(weights)
    zipped = len(zlib.compress(plain, 6))
    rows: dict[str, Tensor] = dict(weights)
    for path in matrix_layers(model):
        csr = rows.pop(f"{path}.weight").to_sparse_csr()
        rows[f"{path}.values"] = csr.values()
        rows[f"{path}.columns"], rows[f"{path}.rows"] = csr.col_indices().int(), csr.crow_indices().int()
    as_csr = io.BytesIO(save(rows)).getbuffer().nbytes
    for kind, size in (("safetensors, deflated", zipped), ("safetensors of CSR", as_csr)):
        case = f"{kind}, {zeros(share)}"
        print(f"{case}: {size / 2**20:.1f} MiB against {len(plain) / 2**20:.1f} dense")
        append_row(
            csv,
            "sparse-bytes",
            case,
            size / 2**20,
            len(plain) / 2**20,
            len(plain) / size,
            "MiB of a Llama 4x512, peer dense",
        )


def main() -> None:
    """Prints what was measured and appends it to the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    products(arguments.csv)
    language_model(arguments.csv)


if __name__ == "__main__":
    main()
