"""lm_head_sample on every backend: the token of the reference, and the distribution of the tokens."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from helpers import BACKENDS, CUDA, EMU, ISAS, backend, randn
from lm_head_helpers import INF, NAN, exact_head, inputs, settings

from persimmon_fast import ops, reference

FILTERS = {
    "none": {},
    "warm": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "greedy": {"temperature": 0.0},
    "top_k 1": {"top_k": 1},
    "top_k 5": {"top_k": 5},
    "top_k 40": {"top_k": 40},
    "top_k 3000": {"top_k": 3000},
    "top_k 2^31 - 1": {"top_k": 2**31 - 1},
    "top_p 0.9": {"top_p": 0.9},
    "top_p 0.2": {"top_p": 0.2},
    "top_p tiny": {"top_p": 1e-6},
    "top_p nearly 1": {"top_p": 0.99999},
    "min_p 0.1": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "all": {"temperature": 0.8, "top_k": 60, "top_p": 0.8, "min_p": 0.02},
    "few": {"temperature": 1.5, "top_k": 6, "top_p": 0.7},
}


def distributions(vocab_size):
    """Logits of one row: usual, peaked, flat, many ties, all equal."""
    z = randn(vocab_size, seed=3)
    yield from (3 * z, 12 * z, 0.05 * z, (2 * z).round() / 2, torch.zeros(vocab_size))


@cache
def every_filter(vocab_size, draws, cases):
    """(x, weight, settings, penalties, what the reference gives without and with them): rows for every filter and
    some distributions, with several seeds. Also top_k of the vocabulary's size and around it."""
    filters = [*FILTERS.values(), *({"top_k": max(0, vocab_size + i)} for i in (-1, 0, 1))]
    logits, rows = [], []
    all_values = list(distributions(vocab_size))
    for case in cases:
        for number, filter_ in enumerate(filters):
            logits += [all_values[case]] * draws
            rows.append(
                settings(draws, **filter_, seed=(-1) ** case * (2**45 + 97 * number), first_offset=2**33 + case)
            )
    x, weight = exact_head(torch.stack(logits))
    args = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    num_rows = x.shape[0]
    best, zero = weight.argmax(0), torch.zeros(num_rows, dtype=torch.int64)
    ids = torch.stack([torch.arange(num_rows) * 7 % vocab_size, zero - 1, best, best, zero], dim=1)
    penalties = {"penalty_ids": ids, "repetition_penalty": torch.linspace(0.5, 3.0, num_rows)}
    none = {"penalty_ids": None, "repetition_penalty": None}
    expected = [reference.lm_head_sample(x, weight, **args, **extra) for extra in (none, penalties)]
    return x, weight, args, penalties, expected


def check_every_filter(name, penalised, vocab_size, draws, cases):
    x, weight, args, penalties, expected = every_filter(vocab_size, draws, cases)
    token_ids, logprobs = expected[penalised]
    with backend(name) as device:
        given = (args | penalties) if penalised else args
        out = ops.lm_head_sample(x.to(device), weight.to(device), **{key: t.to(device) for key, t in given.items()})
    assert torch.nonzero(out[0].cpu() != token_ids).flatten().tolist() == [], "rows with other tokens"
    assert (out[1].cpu() - logprobs).abs().max() < 1e-5


@pytest.mark.parametrize("name", [*ISAS, CUDA])
@pytest.mark.parametrize("penalised", [False, True], ids=["bare", "penalised"])
@pytest.mark.parametrize("vocab_size", [1, 63, 65, 128, 1000, 5003])
def test_takes_the_token_of_the_reference(name, penalised, vocab_size):
    check_every_filter(name, penalised, vocab_size, draws=8, cases=(0, 1, 2, 3, 4))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize(
    ("penalised", "vocab_size", "cases"), [(True, 1, (0,)), (True, 129, (0,)), (False, 257, (3,)), (True, 700, (2, 3))]
)
def test_takes_the_token_of_the_reference_on_tiles(name, penalised, vocab_size, cases):
    check_every_filter(name, penalised, vocab_size, 1, cases)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
def test_takes_the_token_of_the_reference_in_several_blocks(name):
    """More than 32 tiles; the nucleus ends in the second block."""
    vocab_size = 4300
    values = torch.cat([randn(4200, seed=3), torch.full((100,), 4.0)])
    filters = [*[{"top_p": 0.6}] * 4, {"top_k": 130, "top_p": 0.7}, {"temperature": 30.0}]
    x, weight = exact_head(values.repeat(len(filters), 1))
    rows = [settings(1, **filter_, seed=i) for i, filter_ in enumerate(filters)]
    args = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    expected = reference.lm_head_sample(x, weight, **args, penalty_ids=None, repetition_penalty=None)
    with backend(name) as device:
        out = ops.lm_head_sample(x.to(device), weight.to(device), **{k: v.to(device) for k, v in args.items()})
    assert weight.shape[0] == vocab_size
    assert torch.equal(out[0].cpu(), expected[0])


@pytest.mark.parametrize("name", [*ISAS, CUDA])
@pytest.mark.parametrize("num_rows", [1, 6, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_have_their_own_settings_and_penalties(name, num_rows, dtype):
    check_rows_of_their_own(name, num_rows, 2003, dtype)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU])
def test_rows_have_their_own_settings_and_penalties_on_tiles(name):
    check_rows_of_their_own(name, 17, 300, torch.bfloat16)


def check_rows_of_their_own(name, num_rows, vocab_size, dtype):
    with backend(name) as device:
        x, weight = inputs(num_rows, vocab_size, dtype, device=device)
        filters = [settings(1, **FILTERS[key], seed=i, first_offset=-i, device=device) for i, key in enumerate(FILTERS)]
        args = {key: torch.cat([filters[row % len(filters)][key] for row in range(num_rows)]) for key in filters[0]}
        penalised = ops.lm_head_argmax(x, weight)[0].unsqueeze(1).repeat(1, 5)
        penalised[:, 1] = torch.arange(num_rows) % vocab_size
        penalised[:, 3] = -1
        penalised[:, 4] = vocab_size - 1
        penalty = torch.linspace(0.5, 3.0, num_rows).to(device)
        out = ops.lm_head_sample(x, weight, **args, penalty_ids=penalised, repetition_penalty=penalty)
        wide = torch.zeros(num_rows, 9, dtype=torch.int64, device=device)
        wide[:, 2:7] = penalised
        again = ops.lm_head_sample(x, weight, **args, penalty_ids=wide[:, 2:7], repetition_penalty=penalty)
    expected = reference.lm_head_sample(
        x.double(), weight.double(), *args.values(), penalty_ids=penalised, repetition_penalty=penalty
    )
    assert torch.equal(out[0], expected[0])
    assert (out[1] - expected[1]).abs().max() < 1e-4
    assert torch.equal(out[0], again[0])
    assert torch.equal(out[1], again[1])


@pytest.mark.parametrize("name", BACKENDS)
def test_temperature_so_small_that_logits_overflow_takes_the_most_likely_token(name):
    with backend(name) as device:
        x, weight = inputs(4, 300, torch.float32, device=device)
        token_ids, _ = ops.lm_head_sample(x, weight, **settings(4, temperature=1e-40, device=device))
        assert torch.equal(token_ids, ops.lm_head_argmax(x, weight)[0])  # their limit; many z are inf


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_with_nan_or_inf_take_their_argmax(name):
    logits = randn(5, 200, seed=4)
    logits[1, 150], logits[2, 140], logits[3, 20] = NAN, INF, -INF
    logits[4] = -INF
    extra = {"penalty_ids": torch.tensor([[150, 140, 20, 20]]), "repetition_penalty": torch.tensor([1.3])}
    args = settings(1, top_k=50, top_p=0.9) | extra
    for row in range(5):  # a call each: in one product an inf of one row would meet the zeros of the others
        x, weight = exact_head(logits[row : row + 1])
        with backend(name) as device:
            moved = {key: value.to(device) for key, value in args.items()}
            token_ids, logprobs = ops.lm_head_sample(x.to(device), weight.to(device), **moved)
        if row in (0, 3):
            expected = reference.lm_head_sample(x, weight, **args)
            assert token_ids.item() == expected[0].item()
            assert logprobs.item() == pytest.approx(expected[1].item(), abs=1e-5)
        else:
            assert token_ids.item() == {1: 150, 2: 140, 4: 0}[row]
            assert math.isnan(logprobs.item())


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_min_p_is_not_rounded_down(name):
    with backend(name) as device:
        # log(0.5) to fp32 lies below log(0.5), so the second token is less than half as likely as the first
        x, weight = exact_head(torch.tensor([[0.0, math.log(0.5)]], device=device))
        assert weight[1].item() < math.log(0.5)
        tokens = ops.lm_head_sample(x.expand(20, 1), weight, **settings(20, min_p=0.5, device=device))[0]
        assert tokens.tolist() == [0] * 20


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_top_p_adds_probabilities_in_fp64(name):
    second = torch.tensor(-1e-9).item()
    third = torch.tensor(math.log(1e-9))
    while math.exp(second) + math.exp(third.item()) < 1 + 2e-14:
        third = third.nextafter(torch.tensor(0.0))
    total = 1 + math.exp(second) + math.exp(third.item())
    assert 0.5 - 1e-13 < 1 / total < 0.5  # the first token alone is not enough, by less than 2^-39
    x, weight = exact_head(torch.tensor([[0.0, second, third.item()]]))
    args = settings(20, top_p=0.5)
    expected = reference.lm_head_sample(x.expand(20, 1), weight, **args, penalty_ids=None, repetition_penalty=None)
    assert set(expected[0].tolist()) == {0, 1}
    with backend(name) as device:
        moved = {key: value.to(device) for key, value in args.items()}
        tokens = ops.lm_head_sample(x.to(device).expand(20, 1), weight.to(device), **moved)[0]
    assert torch.equal(tokens.cpu(), expected[0])


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
def test_wrong_values_give_some_token_on_cuda(name):
    """They are not checked there: docs/kernels/lm_head.md."""
    wrong = [("temperature", -1.0), ("temperature", NAN), ("temperature", INF), ("top_k", -5), ("top_p", 0.0),
             ("top_p", -1.0), ("top_p", NAN), ("min_p", -0.5), ("min_p", 2.0), ("min_p", NAN)]  # fmt: skip
    with backend(name) as device:
        x, weight = inputs(len(wrong), 200, torch.float32, device=device)
        args = settings(len(wrong), device=device)
        for row, (key, value) in enumerate(wrong):
            args[key][row] = value
        penalties = {
            "penalty_ids": torch.tensor([[200, 2**40, -7]], device=device).repeat(len(wrong), 1),
            "repetition_penalty": torch.full((len(wrong),), 2.0, device=device),
        }
        token_ids, logprobs = ops.lm_head_sample(x, weight, **args, **penalties)
        assert ((token_ids >= 0) & (token_ids < 200)).all()
        assert logprobs.isfinite().all()
        off = ops.lm_head_sample(x, weight, **settings(len(wrong), device=device))[0]
        unfiltered = [row for row, (key, value) in enumerate(wrong) if (key, value) in (("top_k", -5), ("min_p", -0.5))]
        assert torch.equal(token_ids[unfiltered], off[unfiltered])  # and ids of no token were padding


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


@pytest.mark.parametrize("name", ["default", EMU, CUDA])
@pytest.mark.parametrize("filter_", ["none", "warm", "top_p 0.9", "min_p 0.1", "top_k 5"])
def test_sampled_distribution(name, filter_):
    num_draws, vocab_size = (128, 4) if name == "emu" else (20000, 20)
    if name == "emu" and filter_ not in ("none", "top_p 0.9"):
        pytest.skip("emulated rows take 10 ms each; every filter is compared with the reference above")
    with backend(ISAS[-1] if name == "default" else name) as device:
        logits = randn(1, vocab_size, seed=5).to(device)
        x, weight = exact_head(logits)
        args = settings(num_draws, **FILTERS[filter_], seed=11, device=device)
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
