import math

import pytest
import torch

from limbeck.data.cache.codec import VERSION, TopK, TopKCodec, top_k

KL_LIMIT, BYTES_LIMIT = 1e-3, 130


def logits(kind: str, vocab: int, tokens: int = 100) -> torch.Tensor:
    draws = torch.Generator().manual_seed(vocab)
    noise = torch.randn(tokens, vocab, generator=draws)
    if kind == "zipf":  # a heavy tail: token r has about probability 1 / r
        ranks = torch.stack([torch.randperm(vocab, generator=draws) for _ in range(tokens)])
        return -torch.log1p(ranks.float()) + 0.1 * noise
    if kind == "sure":  # nearly all mass on one token
        noise[:, 7] += 18
    return noise * {"flat": 0.01, "normal": 1.0, "sharp": 6.0, "sure": 1.0}[kind]


def kl_error(exact: TopK, decoded: TopK) -> torch.Tensor:
    """KL of the exact distribution over k tokens and the tail to the decoded one, in nats a token."""
    order = exact.ids.argsort(-1)
    p, q = exact.log_probs.gather(-1, order).double(), decoded.log_probs.double()
    p_tail, q_tail = ((1 - x.exp().sum(-1)).clamp_min(1e-12) for x in (p, q))
    inside = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
    return inside + p_tail * (p_tail.log() - q_tail.log())


@pytest.mark.parametrize("kind", ["flat", "normal", "sharp", "sure", "zipf"])
@pytest.mark.parametrize("vocab", [60, 512, 32_000, 50_257, 151_936])
def test_ids_come_back_exactly_and_probabilities_nearly(kind, vocab):
    exact = top_k(logits(kind, vocab, tokens=100 if vocab < 1000 else 20), 50)
    codec = TopKCodec(50, vocab)
    records = codec.encode(exact)
    assert records.dtype == torch.uint8
    assert records.shape == (len(exact.ids), codec.record_bytes)
    assert codec.record_bytes <= BYTES_LIMIT
    decoded = codec.decode(records)
    assert torch.equal(decoded.ids, exact.ids.sort(-1).values)
    error = kl_error(exact, decoded)
    assert float(error.mean()) <= KL_LIMIT
    assert float(error.max()) <= 2 * KL_LIMIT
    assert float(error.min()) >= -1e-5
    assert torch.allclose(decoded.log_partition, exact.log_partition, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["flat", "normal", "sharp", "zipf"])
def test_decoded_probabilities_and_their_tail_sum_to_one(kind):
    exact = top_k(logits(kind, 5000), 50)
    codec = TopKCodec(50, 5000)
    decoded = codec.decode(codec.encode(exact))
    mass, tail = decoded.log_probs.double().exp().sum(-1), 1 - exact.log_probs.double().exp().sum(-1)
    assert torch.allclose(1 - mass, tail, rtol=6e-3, atol=1e-6)


def test_a_whole_vocabulary_has_no_tail():
    exact = top_k(logits("normal", 8), 8)
    codec = TopKCodec(8, 8)
    mass = codec.decode(codec.encode(exact)).log_probs.exp().sum(-1)
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-6)


def test_impossible_tokens_stay_impossible():
    ids = torch.tensor([[3, 1, 2]])
    exact = TopK(ids, torch.tensor([[math.log(0.7), math.log(0.2), -math.inf]]), torch.tensor([math.nan]))
    codec = TopKCodec(3, 10)
    decoded = codec.decode(codec.encode(exact))
    assert decoded.ids.tolist() == [[1, 2, 3]]
    assert decoded.log_probs[0, 1] == -math.inf
    assert decoded.log_probs[0, 2].exp().item() == pytest.approx(0.7, rel=2e-2)
    assert decoded.log_partition.isnan().all()


def test_equal_probabilities_stay_equal():
    exact = TopK(torch.tensor([[4, 2]]), torch.full((1, 2), math.log(0.25)), torch.zeros(1))
    codec = TopKCodec(2, 9)
    assert torch.allclose(codec.decode(codec.encode(exact)).log_probs.exp(), torch.full((1, 2), 0.25), rtol=1e-3)


def test_a_tiny_tail_keeps_its_size():
    tail = torch.tensor([1e-3, 1e-5, 1e-7]).double()
    log_probs = torch.stack([torch.log1p(-tail) + math.log(0.75), torch.log1p(-tail) + math.log(0.25)], 1)
    codec = TopKCodec(2, 100)
    records = codec.encode(TopK(torch.tensor([[5, 9]]).expand(3, 2), log_probs.float(), torch.zeros(3)))
    stored = records[:, :2].contiguous().view(torch.float16).double().exp().squeeze(1)
    assert torch.allclose(stored[:2], tail[:2], rtol=2e-2)


def test_no_tokens_are_no_trouble():
    codec = TopKCodec(5, 100)
    records = codec.encode(TopK(torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5), torch.zeros(0)))
    assert records.shape == (0, codec.record_bytes)
    assert codec.decode(records).ids.shape == (0, 5)


def test_the_header_names_the_codec():
    codec = TopKCodec(50, 151_936)
    assert codec.header[0] == VERSION
    again = TopKCodec.of_header(codec.header)
    assert (again.k, again.vocab, again.bits) == (50, 151_936, codec.bits)


def test_a_header_of_a_later_version_is_refused():
    header = TopKCodec(5, 100).header
    header[0] = VERSION + 1
    with pytest.raises(ValueError, match=f"version {VERSION + 1}"):
        TopKCodec.of_header(header)


def test_records_of_another_size_are_refused():
    with pytest.raises(ValueError, match="records of"):
        TopKCodec(5, 100).decode(torch.zeros(3, 7, dtype=torch.uint8))


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        TopKCodec(1, 10).encode(TopK(torch.tensor([[10]]), torch.zeros(1, 1), torch.zeros(1)))


@pytest.mark.parametrize(("k", "vocab"), [(0, 10), (11, 10), (70_000, 100_000)])
def test_impossible_sizes_are_refused(k, vocab):
    with pytest.raises(ValueError, match="no code"):
        TopKCodec(k, vocab)
