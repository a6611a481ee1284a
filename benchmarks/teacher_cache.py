"""The teacher cache: size, error and speed of the top-k code, and how much faster a training step becomes.

    python benchmarks/teacher_cache.py [--csv benchmarks/results.csv] [--seconds 60]

The code is measured on the logits of a small language model that is first trained on Python's documentation, beside
ids as int32 with log-probabilities as bfloat16. Steps are measured in turns, and their medians compared with the bound
1 + N_t / (3 N_s) for N_t and N_s parameters of teacher and student that take part in matrix products: a live step
passes the student forward and backward and the teacher forward, a cached one the student alone. Of hidden states the
teacher's head is still computed in each step, so their own bound, shown for them, is (3 N_s + N_t) / (3 N_s + head).
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from limbeck.core.specs import CacheSpec, DataSpec, TextSpec, TrainSpec
from limbeck.core.teacher import LiveTeacher, Teacher
from limbeck.core.trainer import Trainer
from limbeck.data.cache.codec import TopK, TopKCodec, top_k
from limbeck.data.cache.views import Views
from limbeck.data.cache.writer import fill_cache
from limbeck.data.loader import Loader
from limbeck.data.open import open_data
from limbeck.data.source import Source
from limbeck.language.predictions import TokenReader
from limbeck.methods.language.kl import ForwardKL
from limbeck.teachers.cached import CachedTeacher
from results import append_row, machine

VOCAB, LENGTH, BATCH, K, TOKENS = 4096, 128, 4, 50, 20_000
LARGER = (32_000, 50_257, 151_936, 262_144)  # vocabularies whose record size is shown too


def gpt2(width: int, layers: int, seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"n_embd": width, "n_layer": layers, "n_head": width // 32, "n_positions": LENGTH, "vocab_size": VOCAB}
    without_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **without_dropout, bos_token_id=1, eos_token_id=2))


def trained(source: Source, seconds: float) -> nn.Module:
    """A small language model after so many seconds."""
    model, loader = gpt2(192, 4, 0).train(), Loader(source, 8, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    end, step, loss = time.monotonic() + seconds, 0, torch.zeros(())
    while time.monotonic() < end:
        (batch,) = loader.at(step)
        loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
    print(f"trained for {step} steps: cross-entropy {loss.item():.2f} nats, {math.log(VOCAB):.2f} at first")
    return model.eval()


@torch.no_grad()
def logits_on(model: nn.Module, source: Source, tokens: int) -> torch.Tensor:
    reader, parts = TokenReader(model, source.fetch(torch.arange(1))), []
    for rows in torch.arange(len(source)).split(8):
        parts.append(reader(source.fetch(rows)).logits())
        if sum(map(len, parts)) >= tokens:
            break
    return torch.cat(parts)[:tokens]


def kl_error(exact: TopK, given: TopK) -> torch.Tensor:
    """KL over the k tokens and the tail, of the exact distribution to what is given, in nats a token."""
    p = exact.log_probs.gather(-1, exact.ids.argsort(-1)).double()
    q = given.log_probs.gather(-1, given.ids.argsort(-1)).double()
    p_tail, q_tail = ((1 - x.exp().sum(-1)).clamp_min(1e-8) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1) + p_tail * (p_tail.log() - q_tail.log())


def rate(work: Callable[[], object], tokens: int, times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return tokens / statistics.median(seconds)


def measure_code(logits: torch.Tensor, csv: Path | None) -> None:
    exact, codec = top_k(logits, K), TopKCodec(K, VOCAB)
    records, tokens = codec.encode(exact), len(logits)
    raw_ids, raw_values = exact.ids.int(), exact.log_probs.bfloat16()
    raw = TopK(raw_ids.long(), raw_values.float(), exact.log_partition)
    ours, theirs = kl_error(exact, codec.decode(records)), kl_error(exact, raw)
    raw_bytes = K * (raw_ids.element_size() + raw_values.element_size())
    tail = 1 - exact.log_probs.exp().sum(-1)
    print(f"{tokens} tokens, k = {K}, vocabulary {VOCAB}: tail {tail.mean():.3f} of the mass")
    print(f"bytes a token  {codec.record_bytes} ({codec.bits} bits a value)   raw bf16 {raw_bytes}")
    print(f"KL error       mean {ours.mean():.2e}, worst {ours.max():.2e}   raw bf16 mean {theirs.mean():.2e}")
    for vocab in LARGER:
        larger = TopKCodec(K, vocab)
        print(f"               vocabulary {vocab:,}: {larger.record_bytes} bytes, {larger.bits} bits a value")
    case = f"top-{K}, vocabulary {VOCAB}"
    _row(csv, f"{case}, against raw bf16", codec.record_bytes, raw_bytes, "bytes/token", less_is_better=True)
    errors = float(ours.mean()), float(theirs.mean())
    _row(csv, f"{case}, KL to the teacher, against raw bf16", *errors, "nats/token", less_is_better=True)
    speeds = {
        "encode": (lambda: codec.encode(exact), lambda: (exact.ids.int(), exact.log_probs.bfloat16())),
        "decode": (lambda: codec.decode(records), lambda: (raw_ids.long(), raw_values.float())),
    }
    for name, (coding, plainly) in speeds.items():
        coded, plain = rate(coding, tokens), rate(plainly, tokens)
        print(f"{name}         {coded:,.0f} tokens/s   raw bf16 {plain:,.0f}")
        _row(csv, f"{case}, {name}, against raw bf16", coded, plain, "tokens/s")


def _row(csv: Path | None, case: str, ours: float, peer: float, unit: str, less_is_better: bool = False) -> None:
    append_row(csv, "teacher_cache", case, ours, peer, peer / ours if less_is_better else ours / peer, unit)


def stepper(teacher: Teacher, source: Source, student: tuple[int, int]) -> Callable[[], None]:
    """One training step of forward KL, data included."""
    method = ForwardKL(ForwardKL.Options(), student=gpt2(*student, 1), teacher=teacher, data=source.info())
    steps = 10_000
    loader = Loader(source, BATCH, 0)
    trainer = Trainer(method, loader, TrainSpec(steps=steps, batch_size=BATCH), steps=steps, items=len(source), seed=0)
    trainer.method.train()

    def step() -> None:
        (batch,) = loader.at(trainer.step)
        trainer.train_step([batch])
        trainer.step += 1

    return step


def matrix_parameters(model: nn.Module) -> int:
    """Parameters in matrix products: all but the positions; the tied embedding counts once, as the head."""
    return sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)


def measure_steps(source: Source, rounds: int, csv: Path | None) -> None:
    sizes = {"teacher": (512, 8), "student": (256, 3)}
    live = LiveTeacher(gpt2(*sizes["teacher"], 2))
    with tempfile.TemporaryDirectory() as folder:
        stored: dict[str, Teacher] = {}
        for kind in ("top-k", "dense", "hidden"):
            spec = CacheSpec(folder=f"{folder}/{kind}", kind=kind)
            begun = time.perf_counter()
            description = fill_cache(spec.folder, live, Views(source), spec, batch_size=BATCH, shard_bytes=8 << 20)
            size = sum(path.stat().st_size for path in Path(spec.folder).iterdir())
            print(f"{kind}: {size / 2**20:.1f} MiB in {description.shards} shards, {time.perf_counter() - begun:.1f} s")
            stored[kind] = one = CachedTeacher(spec.folder)
            for rows in torch.arange(len(source)).split(BATCH):  # the checksums of a first epoch are paid once a run
                one.tokens(source.fetch(rows))
        students, teachers = (matrix_parameters(gpt2(*sizes[who], 0)) for who in ("student", "teacher"))
        bound = 1 + teachers / (3 * students)
        steps = {name: stepper(one, source, sizes["student"]) for name, one in {"live": live, **stored}.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds + 2):
            for name, step in steps.items():
                begun = time.perf_counter()
                step()
                if turn >= 2:
                    seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"N_t {teachers / 1e6:.1f} M, N_s {students / 1e6:.1f} M: bound {bound:.2f}")
    print(f"live    {medians['live'] * 1e3:6.0f} ms")
    head = VOCAB * sizes["teacher"][0]
    bounds = dict.fromkeys(stored, bound) | {"hidden": (3 * students + teachers) / (3 * students + head)}
    items = source.fetch(torch.arange(BATCH))
    for kind, most in bounds.items():
        gain, reading = (
            medians["live"] / medians[kind],
            BATCH / rate(lambda kind=kind: stored[kind].tokens(items), BATCH),
        )
        print(f"{kind:7} {medians[kind] * 1e3:6.0f} ms, of which {reading * 1e3:.1f} ms are reading   "
              f"{gain:.2f} times as fast, {gain / bound:.2f} of the bound, {gain / most:.2f} of its own")  # fmt: skip
        limit = "the bound of its head, which still runs" if kind == "hidden" else "the bound"
        case = f"step with {kind} cache, N_t/N_s = {teachers / students:.1f}, against {limit}"
        _row(csv, case, gain, most, "times as fast as live")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training the model whose logits are coded")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(machine())
    spec = DataSpec(name="pydoc", text=TextSpec(tokenizer=f"bpe:{VOCAB}", length=LENGTH))
    split = open_data(spec)
    model = trained(split.train, arguments.seconds)
    measure_code(logits_on(model, split.validation, TOKENS), arguments.csv)
    measure_steps(split.train.select(torch.arange(160)), arguments.rounds, arguments.csv)


if __name__ == "__main__":
    main()
