"""lm_head_argmax, lm_head_logprobs and lm_head_sample on every CPU instruction set, against the reference."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, ISAS, assert_within_contract, cpu_isa, randn

from persimmon_fast import ops, reference

NAN, INF = float("nan"), float("inf")
# vocabulary: one token, around a register, around a block of 4,096 (512 with many bf16 rows), several blocks
VOCAB_SIZES = [1, 15, 17, 513, 4096, 4097, 9001]
# up to 16 rows stream the weights, more are cut into groups, bf16 on AMX into 128 (sampling: 64)
NUM_ROWS = [0, 1, 2, 16, 17, 33, 130]


def inputs(num_rows, vocab_size, dtype, hidden_size=64):
    x = randn(num_rows, hidden_size, dtype=dtype, seed=1)
    return x, randn(vocab_size, hidden_size, dtype=dtype, seed=2, scale=3 * hidden_size**-0.5)


def exact_head(logits):
    """x and weight in fp32 whose product is `logits` [num_rows, vocab_size] exactly, in any order of summation."""
    return torch.eye(logits.shape[0]), logits.t().contiguous()


def settings(num_rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, first_offset=0):
    """The per-row arguments of lm_head_sample; offsets count up."""
    return {
        "temperature": torch.full((num_rows,), float(temperature)),
        "top_k": torch.full((num_rows,), top_k, dtype=torch.int32),
        "top_p": torch.full((num_rows,), float(top_p)),
        "min_p": torch.full((num_rows,), float(min_p)),
        "seeds": torch.full((num_rows,), seed),
        "offsets": torch.arange(num_rows) + first_offset,
    }


def check_head(x, weight, what):
    expected = reference.lm_head_logits(x.double(), weight.double())
    expected_logprobs = expected.log_softmax(-1)
    plain = F.linear(x, weight).float().log_softmax(-1)
    rows = torch.arange(x.shape[0])

    token_ids, logprobs = ops.lm_head_argmax(x, weight)
    assert token_ids.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    # the same token, or one whose logit is the same but for fp32 rounding
    assert torch.all(expected[rows, token_ids] >= expected.amax(-1) - 1e-5), what
    assert_within_contract(logprobs, expected_logprobs[rows, token_ids], plain[rows, token_ids], what)

    for chosen in (rows * 31 % weight.shape[0], torch.full_like(rows, weight.shape[0] - 1)):
        logprobs = ops.lm_head_logprobs(x, weight, chosen)
        assert_within_contract(logprobs, expected_logprobs[rows, chosen], plain[rows, chosen], what)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_and_logprobs_match_reference(isa, dtype):
    with cpu_isa(isa):
        for vocab_size in VOCAB_SIZES:
            for num_rows in (1, 5, 20):
                check_head(*inputs(num_rows, vocab_size, dtype), f"{isa} {num_rows} rows, {vocab_size} tokens")
        for num_rows in NUM_ROWS:
            check_head(*inputs(num_rows, 700, dtype), f"{isa} {num_rows} rows")
            check_head(*inputs(num_rows, 70, dtype, hidden_size=37), f"{isa} {num_rows} rows, hidden_size 37")


def test_logits_of_many_rows_are_not_rounded_to_16_bits():
    x, weight = inputs(64, 2000, torch.bfloat16, hidden_size=4096)
    expected = reference.lm_head_logits(x.double(), weight.double()).log_softmax(-1)[:, 3]
    error = (ops.lm_head_logprobs(x, weight, torch.full((64,), 3)) - expected).abs().max()
    assert error < 1e-4  # a logit of 4 rounded to bf16 is off by up to 8e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_rows", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_argmax_is_the_lowest_of_equal_logits_and_nan_wins(isa, num_rows, dtype):
    x, weight = inputs(num_rows, 9000, dtype)
    with cpu_isa(isa):
        best = ops.lm_head_argmax(x, weight)[0][0]
        row = weight[best].clone()
        for ids in ([8999, 5], [4100, 4097, 8000], [17, 16]):
            tied = weight.clone()
            tied[best] = 0
            tied[ids] = row
            assert ops.lm_head_argmax(x, tied)[0][0] == min(ids)
        for ids in ([8500, 4200], [3]):
            poisoned = weight.clone()
            poisoned[ids] = NAN
            token_ids, logprobs = ops.lm_head_argmax(x, poisoned)
            assert torch.equal(token_ids, F.linear(x.float(), poisoned.float()).argmax(-1))
            assert token_ids.tolist() == [min(ids)] * num_rows
            assert logprobs.isnan().all()
            assert ops.lm_head_logprobs(x, poisoned, torch.zeros(num_rows, dtype=torch.int64)).isnan().all()
            sampled, logprobs = ops.lm_head_sample(x, poisoned, **settings(num_rows))
            assert torch.equal(sampled, token_ids)
            assert logprobs.isnan().all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_row_of_x_stays_alone(isa):
    x, weight = inputs(5, 5000, torch.float32)
    with cpu_isa(isa):
        before = ops.lm_head_argmax(x, weight)
        x[2, 7] = NAN
        after = ops.lm_head_argmax(x, weight)
    others = [0, 1, 3, 4]
    assert torch.equal(before[0][others], after[0][others])
    assert torch.equal(before[1][others], after[1][others])
    assert after[0][2] == 0
    assert after[1][2].isnan()


def test_infinite_logits():
    x, weight = exact_head(torch.tensor([[1.0, -INF, 3.0, 2.0]]))
    token_ids, logprobs = ops.lm_head_argmax(x, weight)
    assert token_ids.item() == 2
    assert logprobs.item() == pytest.approx(weight.t().log_softmax(-1)[0, 2].item())
    assert ops.lm_head_logprobs(x, weight, torch.tensor([1])).item() == -INF
    draws = {ops.lm_head_sample(x, weight, **settings(1, first_offset=i))[0].item() for i in range(200)}
    assert draws == {0, 2, 3}
    weight[1] = INF
    token_ids, logprobs = ops.lm_head_argmax(x, weight)
    assert token_ids.item() == 1
    assert logprobs.isnan().item()  # as torch.log_softmax


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 2, 7, 16), (17, 40, 70)], ids=["streamed", "many"])
def test_a_row_has_the_same_bits_in_every_batch(dtype, sizes):
    x, weight = inputs(max(sizes), 9001, dtype)
    token_ids, logprobs = ops.lm_head_argmax(x, weight)
    draws = settings(max(sizes), top_p=0.9)
    sampled, sampled_logprobs = ops.lm_head_sample(x, weight, **draws)
    for n in sizes:
        for _ in range(2):
            assert torch.equal(ops.lm_head_argmax(x[:n], weight)[0], token_ids[:n])
            assert torch.equal(ops.lm_head_argmax(x[:n], weight)[1], logprobs[:n])
            out = ops.lm_head_sample(x[:n], weight, **{name: value[:n] for name, value in draws.items()})
            assert torch.equal(out[0], sampled[:n])
            assert torch.equal(out[1], sampled_logprobs[:n])


@pytest.mark.parametrize("num_rows", [3, 40])
def test_bits_do_not_depend_on_the_number_of_threads(num_rows):
    x, weight = inputs(num_rows, 9001, torch.bfloat16, hidden_size=512)
    threads = torch.get_num_threads()
    outs = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs.append((*ops.lm_head_argmax(x, weight), *ops.lm_head_sample(x, weight, **settings(num_rows, top_k=9))))
    finally:
        torch.set_num_threads(threads)
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


@pytest.mark.parametrize("num_rows", [3, 40])
def test_strided_rows(num_rows):
    x, weight = inputs(num_rows, 600, torch.bfloat16, hidden_size=192)
    views = x[:, 64:128], weight[:, 64:128]
    copies = [view.contiguous() for view in views]
    for op, rest in ((ops.lm_head_argmax, {}), (ops.lm_head_sample, settings(num_rows, min_p=0.01))):
        for a, b in zip(op(*views, **rest), op(*copies, **rest), strict=True):
            assert torch.equal(a, b)


# ---- sampling ----

FILTERS = {
    "none": {},
    "warm": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "greedy": {"temperature": 0.0},
    "top_k 1": {"top_k": 1},
    "top_k 40": {"top_k": 40},
    "top_k 3000": {"top_k": 3000},
    "top_p 0.9": {"top_p": 0.9},
    "top_p 0.2": {"top_p": 0.2},
    "top_p tiny": {"top_p": 1e-6},
    "top_p nearly 1": {"top_p": 0.99999},
    "min_p 0.1": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "all": {"temperature": 0.8, "top_k": 60, "top_p": 0.8, "min_p": 0.02},
}


def distributions(vocab_size):
    """Logits of one row: usual, peaked, flat, many ties, all equal."""
    z = randn(vocab_size, seed=3)
    yield from (3 * z, 12 * z, 0.05 * z, (2 * z).round() / 2, torch.zeros(vocab_size))


@cache
def sample_cases(name):
    """(x, weight, other arguments, what the reference gives) for a few vocabularies and distributions."""
    cases = []
    for vocab_size in (1, 63, 65, 1000, 5003):
        for i, logits in enumerate(distributions(vocab_size)):
            x, weight = exact_head(logits.repeat(8, 1))
            args = settings(8, **FILTERS[name], seed=2**45 - i, first_offset=2**33 + i)
            expected = reference.lm_head_sample(x, weight, *args.values(), penalty_ids=None, repetition_penalty=None)
            cases.append((x, weight, args, expected))
    return cases


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FILTERS)
def test_sample_takes_the_token_of_the_reference(isa, name):
    for i, (x, weight, args, expected) in enumerate(sample_cases(name)):
        with cpu_isa(isa):
            token_ids, logprobs = ops.lm_head_sample(x, weight, **args)
        assert torch.equal(token_ids, expected[0]), f"case {i}, {weight.shape[0]} tokens"
        assert (logprobs - expected[1]).abs().max() < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_rows", [1, 6, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_have_their_own_settings_and_penalties(isa, num_rows, dtype):
    x, weight = inputs(num_rows, 2003, dtype)
    filters = [settings(1, **FILTERS[name], seed=i, first_offset=-i) for i, name in enumerate(FILTERS)]
    args = {key: torch.cat([filters[row % len(filters)][key] for row in range(num_rows)]) for key in filters[0]}
    penalised = ops.lm_head_argmax(x, weight)[0].unsqueeze(1).repeat(1, 5)
    penalised[:, 1] = torch.arange(num_rows)
    penalised[:, 3] = -1
    penalised[:, 4] = 2002
    penalty = torch.linspace(0.5, 3.0, num_rows)
    with cpu_isa(isa):
        out = ops.lm_head_sample(x, weight, **args, penalty_ids=penalised, repetition_penalty=penalty)
        wide = torch.zeros(num_rows, 9, dtype=torch.int64)
        wide[:, 2:7] = penalised
        again = ops.lm_head_sample(x, weight, **args, penalty_ids=wide[:, 2:7], repetition_penalty=penalty)
    expected = reference.lm_head_sample(
        x.double(), weight.double(), *args.values(), penalty_ids=penalised, repetition_penalty=penalty
    )
    assert torch.equal(out[0], expected[0])
    assert (out[1] - expected[1]).abs().max() < 1e-4
    assert torch.equal(out[0], again[0])


def test_temperature_so_small_that_logits_overflow_takes_the_most_likely_token():
    x, weight = inputs(4, 300, torch.float32)
    token_ids, _ = ops.lm_head_sample(x, weight, **settings(4, temperature=1e-40))
    assert torch.equal(token_ids, ops.lm_head_argmax(x, weight)[0])  # their limit; many z are inf


def test_philox_known_answer():
    words = reference.philox_uniform(torch.tensor([0]), torch.tensor([0]), 4)[0] * 2.0**32 - 0.5
    assert [f"{int(word):08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def chi_square(tokens, probabilities):
    """Statistic minus its mean, in standard deviations; tokens of probability 0 must not occur."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities * len(tokens)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    statistic = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", ["none", "warm", "top_p 0.9", "min_p 0.1", "top_k 7"])
def test_sampled_distribution(name):
    filters = FILTERS.get(name, {"top_k": 7})
    num_draws, vocab_size = 20000, 20
    logits = randn(1, vocab_size, seed=5)
    x, weight = exact_head(logits)
    args = settings(num_draws, **filters, seed=11)
    tokens = ops.lm_head_sample(x.expand(num_draws, 1), weight, **args)[0]
    z = logits / args["temperature"][0]
    keep = reference.keep_mask(z, args["top_k"][:1], args["top_p"][:1], args["min_p"][:1])
    probabilities = z.double().masked_fill(~keep, -INF).softmax(-1)[0]
    assert abs(chi_square(tokens, probabilities)) < 5


@pytest.mark.parametrize("varied", ["offsets", "seeds"])
def test_draws_of_neighbouring_counters_are_independent(varied):
    num_draws = 20000
    args = settings(num_draws)
    args["offsets"], args["seeds"] = (
        torch.zeros(num_draws, dtype=torch.int64),
        torch.zeros(num_draws, dtype=torch.int64),
    )
    args[varied] = torch.arange(num_draws)
    x, weight = exact_head(torch.tensor([[0.0, 0.5, 1.0, -0.3, 0.2]]))
    tokens = ops.lm_head_sample(x.expand(num_draws, 1), weight, **args)[0]
    p = weight[:, 0].double().softmax(0)
    for lag in (1, 2, 7):
        pairs = tokens[: num_draws - lag : lag + 1] * 5 + tokens[lag :: lag + 1]
        assert abs(chi_square(pairs, torch.outer(p, p).flatten())) < 5


def test_opcheck():
    x, weight = inputs(2, 30, torch.float32)
    ids, penalty = torch.tensor([[1, -1], [2, 3]]), torch.full((2,), 1.2)
    torch.library.opcheck(torch.ops.persimmon_fast.lm_head_argmax.default, (x, weight))
    torch.library.opcheck(torch.ops.persimmon_fast.lm_head_logprobs.default, (x, weight, torch.tensor([3, 4])))
    for extra in ((None, None), (ids, penalty)):
        args = (x, weight, *settings(2).values(), *extra)
        torch.library.opcheck(torch.ops.persimmon_fast.lm_head_sample.default, args)


@pytest.mark.parametrize("op", ["lm_head_argmax", "lm_head_logprobs", "lm_head_sample"])
@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": randn(8)}, ValueError, r"x must be \[num_rows, hidden_size\], got \[8\]"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x must be float32, float16 or bfloat16, got Long"),
        ({"x": randn(2, 0)}, ValueError, r"x must have hidden_size > 0, got \[2, 0\]"),
        ({"x": randn(8, 2).t()}, ValueError, "x must have a last dimension of stride 1"),
        ({"weight": randn(30, 9)}, ValueError,
         r"weight must be \[vocab_size, hidden_size\] = \[-1, 8\], got \[30, 9\]"),
        ({"weight": randn(0, 8)}, ValueError, r"weight must have vocab_size > 0, got \[0, 8\]"),
        ({"weight": randn(30, 8, dtype=torch.float16)}, TypeError, "weight must be Float as x is, got Half"),
        ({"weight": randn(8, 30).t()}, ValueError, "weight must have a last dimension of stride 1"),
    ],
)  # fmt: skip
def test_errors_of_x_and_weight(op, change, error, match):
    args = {"x": randn(2, 8), "weight": randn(30, 8)} | change
    rest = {
        "lm_head_argmax": {},
        "lm_head_logprobs": {"token_ids": torch.tensor([1, 2])},
        "lm_head_sample": settings(2),
    }
    with pytest.raises(error, match=f"{op}: {match}"):
        getattr(ops, op)(**args, **rest[op])


@pytest.mark.parametrize(
    ("token_ids", "error", "match"),
    [
        (torch.tensor([1, 2, 3]), ValueError, r"token_ids must be \[num_rows\] = \[2\], got \[3\]"),
        (torch.tensor([1, 2], dtype=torch.int32), TypeError, "token_ids must be Long, got Int"),
        (torch.tensor([1, 30]), ValueError, r"token_ids\[1\] must be a token below vocab_size = 30, got 30"),
        (torch.tensor([-1, 3]), ValueError, r"token_ids\[0\] must be a token below vocab_size = 30, got -1"),
    ],
)
def test_errors_of_logprobs(token_ids, error, match):
    with pytest.raises(error, match="lm_head_logprobs: " + match):
        ops.lm_head_logprobs(randn(2, 8), randn(30, 8), token_ids)


def second(value, dtype=torch.float32):
    return torch.tensor([1, value], dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"temperature": second(-1.0)}, ValueError, r"temperature\[1\] must be finite and at least 0, got -1"),
        ({"temperature": second(INF)}, ValueError, r"temperature\[1\] must be finite and at least 0, got inf"),
        ({"temperature": second(NAN)}, ValueError, r"temperature\[1\] must be finite and at least 0, got nan"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be \[num_rows\] = \[2\], got \[3\]"),
        ({"temperature": torch.ones(2).double()}, TypeError, "temperature must be Float, got Double"),
        ({"top_k": second(-2, torch.int32)}, ValueError, r"top_k\[1\] must be at least 0, got -2"),
        ({"top_k": second(3, torch.int64)}, TypeError, "top_k must be Int, got Long"),
        ({"top_p": second(0.0)}, ValueError, r"top_p\[1\] must be in \(0, 1\], got 0"),
        ({"top_p": second(1.5)}, ValueError, r"top_p\[1\] must be in \(0, 1\], got 1.5"),
        ({"top_p": second(NAN)}, ValueError, r"top_p\[1\] must be in \(0, 1\], got nan"),
        ({"min_p": second(1.5)}, ValueError, r"min_p\[1\] must be in \[0, 1\], got 1.5"),
        ({"min_p": second(-0.5)}, ValueError, r"min_p\[1\] must be in \[0, 1\], got -0.5"),
        ({"seeds": torch.zeros(1, dtype=torch.int64)}, ValueError, r"seeds must be \[num_rows\] = \[2\], got \[1\]"),
        ({"offsets": torch.zeros(2)}, TypeError, "offsets must be Long, got Float"),
        ({"penalty_ids": torch.zeros(2, 1, dtype=torch.int64)}, ValueError,
         "penalty_ids and repetition_penalty must be given together, got only penalty_ids"),
        ({"repetition_penalty": torch.ones(2)}, ValueError, "got only repetition_penalty"),
        ({"penalty_ids": torch.zeros(1, 1, dtype=torch.int64), "repetition_penalty": torch.ones(2)}, ValueError,
         r"penalty_ids must be \[num_rows, num_penalised\] = \[2, -1\], got \[1, 1\]"),
        ({"penalty_ids": torch.tensor([[1, -1], [-1, 30]]), "repetition_penalty": torch.ones(2)}, ValueError,
         r"penalty_ids\[1, 1\] must be a token below vocab_size = 30 or negative, got 30"),
        ({"penalty_ids": torch.tensor([[1], [2]]), "repetition_penalty": second(0.0)}, ValueError,
         r"repetition_penalty\[1\] must be finite and above 0, got 0"),
    ],
)  # fmt: skip
def test_errors_of_sample(change, error, match):
    with pytest.raises(error, match="lm_head_sample: .*" + match):
        ops.lm_head_sample(randn(2, 8), randn(30, 8), **(settings(2) | change))
