"""lm_head_* over a part of the vocabulary: as the whole head with logits of -inf elsewhere; nothing else is read."""

from __future__ import annotations

import pytest
import torch
from helpers import BACKENDS, CUDA, DTYPES, EMU, ISAS, backend, randn
from lm_head_helpers import INF, NAN, exact_head, inputs, settings

from persimmon_fast import ops, reference

# tiles of 128 tokens on CUDA, blocks of 4,096 or 512 on the CPU: ranges that begin and end inside, at and across their
# ends, alone in a tile, two in one tile, of one token, of all tokens
VOCAB_SIZE = 700
RANGES = [
    [(0, 700)],
    [(0, 100)],
    [(600, 700)],
    [(128, 256)],
    [(127, 257)],
    [(699, 700)],
    [(3, 5), (7, 9), (130, 131), (384, 640)],
    [(0, 1), (1, 128), (512, 513), (690, 699)],
    [(i, i + 1) for i in range(0, 32, 2)],
]


def kept_mask(ranges, vocab_size, device="cpu"):
    kept = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    for begin, end in ranges:
        kept[begin:end] = True
    return kept


def check_ranges(x, weight, ranges):
    """Against the same op without ranges, on a head whose other logits are far below."""
    rows = torch.arange(x.shape[0], device=x.device)
    kept = kept_mask(ranges, weight.shape[0], x.device)
    expected = reference.lm_head_logits(x.double(), weight.double(), ranges).log_softmax(-1)
    assert torch.equal(expected[0] > -INF, kept)

    token_ids, logprobs = ops.lm_head_argmax(x, weight, vocab_ranges=ranges)
    assert kept[token_ids].all()
    assert torch.all(expected[rows, token_ids] >= expected.amax(-1) - 1e-5)
    assert (logprobs - expected[rows, token_ids]).abs().max() < 1e-4

    for chosen in (ranges[0][0] + rows % (ranges[0][1] - ranges[0][0]), torch.full_like(rows, ranges[-1][1] - 1)):
        logprobs = ops.lm_head_logprobs(x, weight, chosen, vocab_ranges=ranges)
        assert (logprobs - expected[rows, chosen]).abs().max() < 1e-4
    if not kept.all():
        for skipped in (int((~kept).nonzero()[0]), int((~kept).nonzero()[-1])):
            logprobs = ops.lm_head_logprobs(x, weight, torch.full_like(rows, skipped), vocab_ranges=ranges)
            assert (logprobs == -INF).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("num_rows", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_and_logprobs_are_those_of_the_kept_tokens(name, num_rows, dtype):
    with backend(name) as device:
        x, weight = inputs(num_rows, VOCAB_SIZE, dtype, device=device)
        for ranges in RANGES if name != "emu" or num_rows == 1 else RANGES[-3:]:
            check_ranges(x, weight, ranges)


@pytest.mark.parametrize("name", [*ISAS, CUDA])
@pytest.mark.parametrize("num_rows", [2, 40])
def test_ranges_of_many_blocks(name, num_rows):
    with backend(name) as device:
        x, weight = inputs(num_rows, 13000, torch.bfloat16, device=device)
        check_ranges(x, weight, [(5, 4200), (4300, 4301), (8000, 12999)])


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "ranges"),
    [
        ((3, 390, 40), [(3, 5), (7, 127), (385, 386)]),
        ((18, 390, 40), [(3, 5), (7, 127), (385, 386)]),  # not streamed
        ((2, 5000, 8), [(130, 140), (2100, 2200), (4000, 4001)]),  # more tiles than blocks
    ],
    ids=str,
)
def test_few_ranges(name, dtype, shape, ranges):
    with backend(name) as device:
        check_ranges(*inputs(*shape[:2], dtype, shape[2], device), ranges)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_top_k_of_more_tokens_than_are_kept(name):
    ranges = [(3, 5), (7, 127), (385, 386)]
    with backend(name) as device:
        x, weight = exact_head(-5 - randn(12, 390, seed=8).abs().to(device))
        draws = settings(12, top_k=200, temperature=3.0, device=device)
        token_ids, _ = ops.lm_head_sample(x, weight, **draws, vocab_ranges=ranges)
        args = draws | {"penalty_ids": None, "repetition_penalty": None}
        assert torch.equal(token_ids, reference.lm_head_sample(x, weight, **args, vocab_ranges=ranges)[0])


FILTERS = [
    {},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_k": 400},  # more than the ranges hold
    {"top_p": 0.8},
    {"min_p": 0.02},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.01, "temperature": 1.7},
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("penalised", [False, True])
def test_draws_are_those_of_the_reference(name, filters, penalised):
    num_rows = 8 if name == "emu" else 40
    with backend(name) as device:
        x, weight = exact_head(2 * randn(num_rows, VOCAB_SIZE, seed=4).to(device))
        draws = settings(num_rows, **filters, device=device)
        if penalised:  # kept and skipped tokens, the likeliest one among them
            likeliest = (x @ weight.t()).argmax(-1, keepdim=True)
            others = torch.tensor([[4, 6, 200, 699, 385, -1]], device=device).expand(num_rows, -1)
            draws |= {
                "penalty_ids": torch.cat([likeliest, others], dim=1),
                "repetition_penalty": torch.full((num_rows,), 1.7, device=device),
            }
        for ranges in (RANGES[3], RANGES[6]):
            token_ids, logprobs = ops.lm_head_sample(x, weight, **draws, vocab_ranges=ranges)
            args = {"penalty_ids": None, "repetition_penalty": None} | draws
            expected_ids, expected = reference.lm_head_sample(x, weight, **args, vocab_ranges=ranges)
            assert torch.equal(token_ids, expected_ids)
            assert kept_mask(ranges, VOCAB_SIZE, device)[token_ids].all()
            assert (logprobs - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_the_same_ids_as_the_whole_head_with_other_logits_at_minus_infinity(name):
    ranges = RANGES[6]
    with backend(name) as device:
        # one feature, so that -inf is a weight and no product with zero
        x, weight = torch.ones(12, 1, device=device), 3 * randn(VOCAB_SIZE, 1, seed=5).to(device)
        lowered = weight.clone()
        lowered[~kept_mask(ranges, VOCAB_SIZE, device)] = -INF
        for op, rest in ((ops.lm_head_argmax, {}), (ops.lm_head_sample, settings(12, top_k=20, device=device))):
            whole, part = op(x, lowered, **rest), op(x, weight, **rest, vocab_ranges=ranges)
            assert torch.equal(whole[0], part[0])
            assert (whole[1] - part[1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("num_rows", [2, 20])
def test_what_is_skipped_is_not_looked_at(name, num_rows):
    ranges = [(2, 9), (140, 141), (513, 600)]
    with backend(name) as device:
        x, weight = inputs(num_rows, VOCAB_SIZE, torch.float32, device=device)
        poisoned = weight.clone()
        poisoned[~kept_mask(ranges, VOCAB_SIZE, device)] = NAN
        for op, rest in ((ops.lm_head_argmax, {}), (ops.lm_head_sample, settings(num_rows, top_p=0.9, device=device))):
            clean = op(x, weight, **rest, vocab_ranges=ranges)
            dirty = op(x, poisoned, **rest, vocab_ranges=ranges)
            assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_a_skipped_token_is_not_chosen_even_where_no_token_is_possible(name):
    with backend(name) as device:
        x = torch.ones(1, 1, device=device)
        weight = torch.full((300, 1), -INF, device=device)
        for ranges in ([(5, 9)], [(131, 132), (290, 299)]):
            assert ops.lm_head_argmax(x, weight, vocab_ranges=ranges)[0].item() == ranges[0][0]
            sampled, _ = ops.lm_head_sample(x, weight, **settings(1, device=device), vocab_ranges=ranges)
            assert sampled.item() == ranges[0][0]


@pytest.mark.parametrize("name", [EMU, CUDA])
def test_tokens_that_do_not_exist_are_not_skipped_ones(name):
    with backend(name) as device:
        x, weight = inputs(3, 140, torch.float32, device=device)
        logprobs = ops.lm_head_logprobs(x, weight, torch.tensor([-1, 140, 3], device=device), vocab_ranges=[(5, 9)])
        assert logprobs.isnan().tolist() == [True, True, False]
        assert logprobs[2] == -INF


@pytest.mark.parametrize("name", BACKENDS)
def test_more_rows_than_a_chunk(name):
    num_rows = 67  # of sampling
    with backend(name) as device:
        x, weight = inputs(num_rows, 300, torch.float32, 8, device)
        draws = settings(num_rows, device=device)
        token_ids, _ = ops.lm_head_sample(x, weight, **draws, vocab_ranges=[(100, 140)])
        args = draws | {"penalty_ids": None, "repetition_penalty": None}
        assert torch.equal(token_ids, reference.lm_head_sample(x, weight, **args, vocab_ranges=[(100, 140)])[0])


def test_opcheck():
    x, weight = inputs(2, 30, torch.float32)
    ranges = [1, 4, 9, 30]
    torch.library.opcheck(torch.ops.persimmon_fast.lm_head_argmax.default, (x, weight, ranges))
    torch.library.opcheck(torch.ops.persimmon_fast.lm_head_logprobs.default, (x, weight, torch.tensor([3, 4]), ranges))
    args = (x, weight, *settings(2).values(), None, None, ranges)
    torch.library.opcheck(torch.ops.persimmon_fast.lm_head_sample.default, args)


@pytest.mark.parametrize("op", ["lm_head_argmax", "lm_head_logprobs", "lm_head_sample"])
@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        ([], "vocab_ranges must be 1 to 16 pairs of begin and end, got 0 numbers"),
        ([(i, i + 1) for i in range(17)], "vocab_ranges must be 1 to 16 pairs of begin and end, got 34 numbers"),
        ([(1, 2, 3)], "vocab_ranges must be 1 to 16 pairs of begin and end, got 3 numbers"),
        ([(3, 3)], r"vocab_ranges must ascend without overlap or empty range inside vocab_size = 30, got \[3, 3\]"),
        ([(5, 9), (8, 10)], "vocab_ranges must ascend"),
        ([(5, 9), (1, 2)], "vocab_ranges must ascend"),
        ([(-1, 4)], "vocab_ranges must ascend"),
        ([(20, 31)], "vocab_ranges must ascend"),
    ],
)
def test_errors(op, ranges, match):
    rest = {
        "lm_head_argmax": {},
        "lm_head_logprobs": {"token_ids": torch.tensor([1, 2])},
        "lm_head_sample": settings(2),
    }
    with pytest.raises(ValueError, match=f"{op}: {match}"):
        getattr(ops, op)(randn(2, 8), randn(30, 8), **rest[op], vocab_ranges=ranges)
