"""lm_head_argmax and lm_head_logprobs on every backend, against the reference; what they share with lm_head_sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, CUDA, DTYPES, EMU, ISAS, assert_within_contract, backend, randn
from lm_head_helpers import INF, NAN, exact_head, inputs, settings

from persimmon_fast import ops, reference

# vocabulary: one token, around a register, around a block of 4,096 (512 with many bf16 rows), several blocks
VOCAB_SIZES = [1, 15, 17, 513, 4096, 4097, 9001]
# up to 16 rows stream the weights, more are cut into groups, bf16 on AMX into 128 (sampling: 64)
NUM_ROWS = [0, 1, 2, 16, 17, 33, 130]
# rows, vocabulary, hidden_size of the CUDA kernels' tiles: 64 x 128, k in steps of 32 through 4 stages; the last one of
# SMALL_SHAPES takes the large tile of 128 x 128 on the emulator's 8 multiprocessors, and GPU_SHAPES on a real GPU
TILE_SHAPES = [
    (1, 1, 8), (1, 127, 32), (2, 128, 40), (63, 129, 128), (64, 256, 296), (66, 129, 1), (5, 255, 301), (128, 640, 40),
]  # fmt: skip
SMALL_SHAPES = [(3, 130, 37), (65, 257, 160), (129, 300, 40)]
GPU_SHAPES = [(300, 17000, 264), (1100, 40000, 64)]


def check_head(x, weight, what):
    """On the device of x, inside `with backend(name)`."""
    expected = reference.lm_head_logits(x.double(), weight.double())
    expected_logprobs = expected.log_softmax(-1)
    plain = F.linear(x, weight).float().log_softmax(-1)
    rows = torch.arange(x.shape[0], device=x.device)

    token_ids, logprobs = ops.lm_head_argmax(x, weight)
    assert token_ids.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    assert token_ids.device == logprobs.device == x.device
    # the same token, or one whose logit is the same but for fp32 rounding
    assert torch.all(expected[rows, token_ids] >= expected.amax(-1) - 1e-5), what
    assert_within_contract(logprobs, expected_logprobs[rows, token_ids], plain[rows, token_ids], what)

    for chosen in (rows * 31 % weight.shape[0], torch.full_like(rows, weight.shape[0] - 1)):
        logprobs = ops.lm_head_logprobs(x, weight, chosen)
        assert_within_contract(logprobs, expected_logprobs[rows, chosen], plain[rows, chosen], what)


@pytest.mark.parametrize("name", [*ISAS, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_and_logprobs_match_reference(name, dtype):
    with backend(name) as device:
        for vocab_size in VOCAB_SIZES:
            for num_rows in (1, 5, 20):
                x, weight = inputs(num_rows, vocab_size, dtype, device=device)
                check_head(x, weight, f"{name} {num_rows} rows, {vocab_size} tokens")
        for num_rows in NUM_ROWS:
            check_head(*inputs(num_rows, 700, dtype, device=device), f"{name} {num_rows} rows")
            check_head(*inputs(num_rows, 70, dtype, 37, device), f"{name} {num_rows} rows, hidden_size 37")


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", TILE_SHAPES, ids=str)
def test_tiles(name, dtype, shape):
    with backend(name) as device:
        check_head(*inputs(*shape[:2], dtype, shape[2], device), f"{name} {shape}")


@pytest.mark.sanitize
@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
def test_few_tiles(name, dtype, shape):
    with backend(name) as device:
        check_head(*inputs(*shape[:2], dtype, shape[2], device), f"{name} {shape}")


@pytest.mark.parametrize("name", [CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_large_tiles(name, dtype, shape):
    with backend(name) as device:
        check_head(*inputs(*shape[:2], dtype, shape[2], device), f"{name} {shape}")


@pytest.mark.parametrize("name", [EMU, CUDA])
def test_more_rows_than_a_chunk(name):
    with backend(name) as device:
        x, weight = inputs(1030, 9, torch.float32, 8, device)
        token_ids, logprobs = ops.lm_head_argmax(x, weight)
    expected = reference.lm_head_logits(x.double(), weight.double()).log_softmax(-1).max(-1)
    assert torch.equal(token_ids, expected.indices)
    assert (logprobs - expected.values).abs().max() < 1e-5


@pytest.mark.parametrize("name", [*ISAS, CUDA])
def test_logits_are_not_rounded_to_16_bits(name):
    with backend(name) as device:
        x, weight = inputs(64, 2000, torch.bfloat16, 4096, device)
        expected = reference.lm_head_logits(x.double(), weight.double()).log_softmax(-1)[:, 3]
        error = (ops.lm_head_logprobs(x, weight, torch.full((64,), 3, device=device)) - expected).abs().max()
        assert error < 1e-4  # a logit of 4 rounded to bf16 is off by up to 8e-3


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("num_rows", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_is_the_lowest_of_equal_logits_and_nan_wins(name, num_rows, dtype):
    # first and last block; neighbours around the end of a block of the CPU, and of a tile; one register, one lane
    vocab_size, *ties = (300, [299, 5], [128, 127, 260], [17, 16]) if name == "emu" else (
        9000, [8999, 5], [4100, 4097, 8000], [17, 16])  # fmt: skip
    with backend(name) as device:
        x, weight = inputs(num_rows, vocab_size, dtype, device=device)
        best = ops.lm_head_argmax(x, weight)[0][0]
        row = weight[best].clone()
        for ids in ties:
            tied = weight.clone()
            tied[best] = 0
            tied[ids] = row
            assert ops.lm_head_argmax(x, tied)[0][0] == min(ids)
        for ids in (ties[0], [3]):
            poisoned = weight.clone()
            poisoned[ids] = NAN
            token_ids, logprobs = ops.lm_head_argmax(x, poisoned)
            assert token_ids.tolist() == [min(ids)] * num_rows
            assert logprobs.isnan().all()
            chosen = torch.zeros(num_rows, dtype=torch.int64, device=device)
            assert ops.lm_head_logprobs(x, poisoned, chosen).isnan().all()
            sampled, logprobs = ops.lm_head_sample(x, poisoned, **settings(num_rows, device=device))
            assert torch.equal(sampled, token_ids)
            assert logprobs.isnan().all()


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_beyond_the_vocabulary_beats_negative_logits(name):
    with backend(name) as device:
        logits = -5 - randn(2, 130, seed=6).abs().to(device)
        x, weight = exact_head(logits)
        token_ids, logprobs = ops.lm_head_argmax(x, weight)
        assert torch.equal(token_ids, logits.argmax(-1))
        assert (logprobs - logits.log_softmax(-1).amax(-1)).abs().max() < 1e-5


@pytest.mark.sanitize
@pytest.mark.parametrize("name", BACKENDS)
def test_zeros_of_either_sign_are_equal(name):
    with backend(name) as device:
        for logits in ([-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]):
            # products that are -0: the sum of one term alone keeps the sign
            x, weight = torch.tensor([[1.0]], device=device), torch.tensor(logits, device=device).unsqueeze(1)
            assert ops.lm_head_argmax(x, weight)[0].item() == 1


@pytest.mark.parametrize("name", BACKENDS)
def test_a_nan_row_of_x_stays_alone(name):
    with backend(name) as device:
        x, weight = inputs(5, 300 if name == "emu" else 5000, torch.float32, device=device)
        before = ops.lm_head_argmax(x, weight)
        x[2, 7] = NAN
        after = ops.lm_head_argmax(x, weight)
    others = [0, 1, 3, 4]
    assert torch.equal(before[0][others], after[0][others])
    assert torch.equal(before[1][others], after[1][others])
    assert after[0][2] == 0
    assert after[1][2].isnan()


@pytest.mark.parametrize("name", BACKENDS)
def test_infinite_logits(name):
    with backend(name) as device:
        x, weight = exact_head(torch.tensor([[1.0, -INF, 3.0, 2.0]], device=device))
        token_ids, logprobs = ops.lm_head_argmax(x, weight)
        assert token_ids.item() == 2
        assert logprobs.item() == pytest.approx(weight.t().log_softmax(-1)[0, 2].item())
        assert ops.lm_head_logprobs(x, weight, torch.tensor([1], device=device)).item() == -INF
        draws = settings(60, device=device)
        assert set(ops.lm_head_sample(x.expand(60, 1), weight, **draws)[0].tolist()) == {0, 2, 3}
        weight[1] = INF
        token_ids, logprobs = ops.lm_head_argmax(x, weight)
        assert token_ids.item() == 1
        assert logprobs.isnan().item()  # as torch.log_softmax
        weight[:] = -INF
        token_ids, logprobs = ops.lm_head_argmax(x, weight)
        assert token_ids.item() == 0
        assert logprobs.isnan().item()


def check_rows_alone(x, weight, groups):
    """The same bits for groups of rows (slices) as for all of them, twice."""
    draws = settings(x.shape[0], top_p=0.9, device=x.device)
    token_ids, logprobs = ops.lm_head_argmax(x, weight)
    sampled, sampled_logprobs = ops.lm_head_sample(x, weight, **draws)
    for rows in groups:
        for _ in range(2):
            out = ops.lm_head_argmax(x[rows], weight)
            assert torch.equal(out[0], token_ids[rows])
            assert torch.equal(out[1], logprobs[rows])
            out = ops.lm_head_sample(x[rows], weight, **{key: value[rows] for key, value in draws.items()})
            assert torch.equal(out[0], sampled[rows])
            assert torch.equal(out[1], sampled_logprobs[rows])


@pytest.mark.parametrize("name", [*ISAS, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 2, 7, 16), (17, 40, 70)], ids=["streamed", "many"])
def test_a_row_has_the_same_bits_in_every_batch(name, dtype, sizes):
    with backend(name) as device:
        x, weight = inputs(max(sizes), 9001, dtype, device=device)
        check_rows_alone(x, weight, [slice(n) for n in sizes])


@pytest.mark.parametrize("name", [EMU, CUDA])
def test_a_row_has_the_same_bits_in_every_batch_and_chunk(name):
    with backend(name) as device:
        check_rows_alone(*inputs(67, 140, torch.bfloat16, device=device), [slice(0, 17), slice(50, 67)])
        check_rows_alone(*inputs(16, 140, torch.bfloat16, device=device), [slice(0, 1), slice(11, 16)])


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tile_and_alignment_change_no_bit(name, dtype):
    with backend(name) as device:
        x, weight = inputs(128, 640, dtype, 105, device)
        views = x[:, :104].contiguous(), weight[:, :104].contiguous()
        out = ops.lm_head_argmax(*views)  # the large tile on the emulator
        few = ops.lm_head_argmax(views[0][:17], views[1])
        assert torch.equal(few[1], out[1][:17])
        for rows in (17, 16):  # 16: streamed
            few = ops.lm_head_argmax(views[0][:rows], views[1])
            assert torch.equal(ops.lm_head_argmax(x[:rows, :104], weight[:, :104])[1], few[1])  # rows of 210 bytes


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


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("num_rows", [3, 40])
@pytest.mark.parametrize("first", [64, 3], ids=["aligned", "unaligned"])
def test_strided_rows(name, num_rows, first):
    with backend(name) as device:
        x, weight = inputs(num_rows, 200 if name == "emu" else 600, torch.bfloat16, 192, device)
        views = x[:, first : first + 64], weight[:, first : first + 64]
        copies = [view.contiguous() for view in views]
        for op, rest in ((ops.lm_head_argmax, {}), (ops.lm_head_sample, settings(num_rows, min_p=0.01, device=device))):
            for a, b in zip(op(*views, **rest), op(*copies, **rest), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", [EMU, CUDA])
def test_tokens_that_do_not_exist_have_probability_nan_on_cuda(name):
    with backend(name) as device:
        x, weight = inputs(4, 140, torch.float32, device=device)
        chosen = torch.tensor([-1, 140, 2**40, 139], device=device)
        assert ops.lm_head_logprobs(x, weight, chosen).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", [EMU, CUDA])
def test_errors_of_a_vocabulary_that_is_too_large_for_cuda(name):
    with backend(name) as device:
        x, weight = randn(2, 8).to(device), randn(1, 8).to(device)
        with pytest.raises(ValueError, match="lm_head_argmax: weight must have vocab_size <= 2147483519 on CUDA"):
            ops.lm_head_argmax(x, weight.expand(2**31 - 128, 8))
        with pytest.raises(ValueError, match="lm_head_sample: weight must have vocab_size <= 16777216 on CUDA"):
            ops.lm_head_sample(x, weight.expand(2**24 + 1, 8), **settings(2, device=device))


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
