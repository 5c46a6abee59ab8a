"""Correct kernels and what they must compute, whatever the schedule. Needs no torch.

python tests/emu/clean_kernels.py LIBRARY    runs all of them in every schedule (test_primitives.py)
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
from cute import bits_of
from kernel_library import ASYNC_POLICIES, SCHEDULES, Library, run_fault

LANES = np.arange(32)


def builtin_variables(library: Library) -> None:
    out = np.zeros(12 * 24, np.uint32)
    library.run("builtin_variables", out)
    np.testing.assert_array_equal(out, np.add.outer(1000 * np.arange(12), np.arange(24)).reshape(-1))


def shuffles(library: Library) -> None:
    out = np.zeros((32, 10), np.int32)
    library.run("shuffles", out)
    expected = [
        np.full(32, 5),
        LANES // 8 * 8 + (LANES + 1) % 8,
        LANES ^ 3,
        np.where((LANES ^ 8) // 8 > LANES // 8, LANES, LANES ^ 8),  # a later group of 8 cannot be read
        np.where(LANES + 2 < 32, LANES + 2, LANES),
        np.where(LANES % 4 + 2 < 4, LANES + 2, LANES),
        np.where(LANES >= 3, LANES - 3, LANES),
        np.where(LANES % 16 >= 1, LANES - 1, LANES),
        LANES ^ 1,
    ]
    np.testing.assert_array_equal(out[:, :9], 10 * np.stack(expected, axis=1))
    np.testing.assert_array_equal(out[:, 9], 10 * (LANES ^ 1) + np.where(LANES < 16, 2, 1))


def votes(library: Library) -> None:
    out = np.zeros((32, 4), np.uint32)
    library.run("votes", out)
    np.testing.assert_array_equal(out[:, 0], sum(1 << lane for lane in range(0, 32, 3)))
    np.testing.assert_array_equal(out[:, 1], 1)
    np.testing.assert_array_equal(out[:, 2], 0)
    np.testing.assert_array_equal(out[:, 3], np.uint32(0xAA) << (LANES // 8 * 8).astype(np.uint32))


def reductions(library: Library) -> None:
    out = np.zeros((32, 8), np.int32)
    library.run("reductions", out)
    xor = np.bitwise_xor.reduce(LANES * LANES)
    expected = [LANES.sum() - 320, -10, -5, 31, 64, 31, xor, 4 * 1000000 + 4 * 10000 + 31 * 100 + 3]
    np.testing.assert_array_equal(out, np.tile(expected, (32, 1)))


def atomics(library: Library) -> None:
    threads = np.arange(256)
    counters = np.zeros(10, np.int32)
    counters[9] = -1
    floats, doubles, longs = np.zeros(1, np.float32), np.zeros(1, np.float64), np.zeros(1, np.uint64)
    library.run("atomics", counters, floats, doubles, longs)
    xor = np.bitwise_xor.reduce(threads)
    every_bit = 2**31 - 1
    np.testing.assert_array_equal(counters, [256, -512, 255, -255, every_bit, xor, 42, 768, 256 % 100, -1 - every_bit])
    assert (floats[0], doubles[0], longs[0]) == (128.0, 64.0, 256 << 33)


def cp_async_sizes(library: Library) -> None:
    source = np.arange(1, 65, dtype=np.uint8)
    for num_valid in (0, 1, 4, 7, 8, 15, 16):
        out = np.zeros(64, np.uint8)
        library.run("cp_async_sizes", source, out, numbers=(num_valid,))
        np.testing.assert_array_equal(out, np.where(np.arange(64) < 48 + num_valid, source, 0))


def cp_async_pipeline(library: Library) -> None:
    for num_tiles in (1, 2, 3, 7):  # 7: every stage twice, and one more
        tiles = np.arange(64 * num_tiles, dtype=np.float32)
        sums = np.full((num_tiles, 16), np.nan, np.float32)
        library.run("cp_async_pipeline", tiles, sums, numbers=(num_tiles,))
        np.testing.assert_array_equal(sums, np.repeat(tiles.reshape(-1, 64).sum(1), 16).reshape(-1, 16))


def named_barriers(library: Library) -> None:
    out = np.zeros(64, np.int32)
    library.run("named_barriers", out)
    np.testing.assert_array_equal(out, np.concatenate([LANES ^ 1, 64 + (LANES ^ 1)]))


def chain_of_blocks(library: Library) -> None:
    sums, flags = np.zeros((4, 32), np.int32), np.zeros(4, np.uint32)
    library.run("chain_of_blocks", sums, flags)
    np.testing.assert_array_equal(sums, np.outer(np.arange(1, 5), LANES))


def grid_barrier(library: Library) -> None:
    values, arrived, out = np.zeros(128, np.int32), np.zeros(1, np.uint32), np.zeros((4, 32), np.int32)
    library.run("grid_barrier", values, arrived, out)
    np.testing.assert_array_equal(out, np.add.outer(100 * ((np.arange(4) + 1) % 4), LANES))


def byte_permutes(library: Library) -> None:
    out = np.zeros(3, np.uint32)
    library.run("byte_permutes", out)
    assert list(out) == [0x55441100, 0x77663322, 0x00116677]


def math(library: Library) -> None:
    x = np.float32(0.3)
    out = np.zeros(10, np.float32)
    out[0] = x
    library.run("math", out)
    expected = [1 / np.sqrt(x), np.exp(x), np.exp2(x), x * x + 1, x, np.log1p(x), x, np.nextafter(x, np.float32(1))]
    np.testing.assert_allclose(out[:8], expected, rtol=2e-7)
    assert out[8] == np.float32(0.30078125)  # the nearest bf16
    assert out[9] == np.float32(np.float16(x))


def sm90_gemm(library: Library) -> None:
    rng = np.random.default_rng(0)
    for k in (64, 192, 448, 200):  # one tile, as many as stages, twice as many and one more, a tail
        a, b = rng.integers(-8, 9, (64, k)), rng.integers(-8, 9, (64, k))
        d = np.full((64, 64), np.nan, np.float32)
        library.run("gemm", bits_of(a, "bf16"), bits_of(b, "bf16"), d, numbers=(0, 64, k))
        np.testing.assert_array_equal(d, a @ b.T)


def sm90_cluster_gemm(library: Library) -> None:
    rng = np.random.default_rng(1)
    for k in (64, 192, 448, 200):
        a, b = rng.integers(-8, 9, (128, k)), rng.integers(-8, 9, (64, k))
        d = np.full((128, 64), np.nan, np.float32)
        library.run("cluster_gemm", bits_of(a, "bf16"), bits_of(b, "bf16"), d, numbers=(0, 64, k))
        np.testing.assert_array_equal(d, a @ b.T)


def sm90_cluster_exchange(library: Library) -> None:
    out, threads = np.zeros((4, 2, 64), np.int32), np.arange(64)
    library.run("cluster_exchange", out)
    for block in range(4):
        np.testing.assert_array_equal(out[block, 0], 100 * (block ^ 1) + (threads + 1) % 64)
        np.testing.assert_array_equal(out[block, 1], 1000 + 100 * (block ^ 1) + threads)


def sm90_tma_store(library: Library) -> None:
    tensor, seen = np.zeros((2, 512), np.uint16), np.zeros(1, np.uint32)
    library.run("tma_store", tensor, seen)
    np.testing.assert_array_equal(tensor[0, :64].view(np.uint32), LANES)


def sm90_product(library: Library) -> None:
    d = np.zeros(128, np.float32)
    library.run("product", d)
    np.testing.assert_array_equal(d, 32)


CHECKS = (
    builtin_variables, shuffles, votes, reductions, atomics, byte_permutes, cp_async_sizes, cp_async_pipeline,
    named_barriers, chain_of_blocks, grid_barrier, math, sm90_gemm, sm90_cluster_gemm, sm90_cluster_exchange,
    sm90_tma_store, sm90_product,
)  # fmt: skip
# The correct variants of the kernels of test_faults.py whose threads depend on each other.
CORRECT = (
    "missing_barrier", "missing_barrier_before_reuse", "divergent_barrier", "uneven_rounds", "deadlock",
    "divergent_shuffle", "wrong_wait_count", "wrong_wait_count_ldmatrix", "missing_barrier_after_wait",
    "race_in_block", "race_between_blocks", "last_block", "plain_read_of_a_flag", "relaxed_message", "livelock",
    "dependent_launch", "tma_load", "registers", "cluster_wait_without_arrive",
)  # fmt: skip


def check_all(library: Library, configuration: dict) -> None:
    library.configure(**configuration)
    for check in CHECKS:
        try:
            check(library)
        except Exception as error:
            raise AssertionError(f"{check.__name__} under {configuration}: {error}") from error
    for case in CORRECT:
        message = run_fault(library, case, 0, broken=False)[0]
        assert message is None, f"{case} under {configuration}: {message}"


def configurations() -> list[dict]:
    """Every schedule with every policy. The blocks of a chain wait for each other, so all four are resident."""
    return [
        {"sched": sched, "async_policy": policy, "seed": seed, "resident": 4, "architecture": 90}
        for seed, (sched, policy) in enumerate(itertools.product(SCHEDULES, ASYNC_POLICIES))
    ]


if __name__ == "__main__":
    emulated = Library(sys.argv[1])
    for wanted in configurations():
        check_all(emulated, wanted)
    print(f"{len(configurations())} configurations, {emulated.stats().launches} launches")
