"""The pipeline of the flash attention kernel for sm_90a, emulated and on a GPU: rings, warpgroups, items, pages, ends.

Values, masks, lengths and layouts: test_flash_attention.py and test_paged_attention.py, which run on it too.
"""

from __future__ import annotations

import pytest
import test_flash_attention as flash
import test_paged_attention as paged
import torch
from helpers import CUDA, EMU_SM90, backend, emulator_counts
from test_flash_attention import check, inputs, packed

BACKENDS = [EMU_SM90, CUDA]
pytestmark = pytest.mark.sanitize
STAGES = 3
KEY_TILE = 128
BLOCK_ROWS = {64: 192, 128: 128}


def counted(name, run):
    """Runs it; emulated, it must have multiplied by wgmma."""
    if name == "cuda":
        return run()
    result = []
    assert emulator_counts(lambda: result.append(run()))["wgmmas"] > 0
    return result[0]


def counted_check(name, q, k, v, causal, **kwargs):
    counted(name, lambda: check(q, k, v, causal, f"{len(q)} x {len(k)}", **kwargs))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_tiles", [1, STAGES, 2 * STAGES + 1])
def test_laps_of_the_rings(name, head_dim, num_tiles):
    with backend(name) as device:
        for num_keys in (num_tiles * KEY_TILE, num_tiles * KEY_TILE - 1):
            # Two warpgroups with queries, so that the turn to multiply goes round; with a mask one of them ends earlier
            tensors = inputs(65, num_keys, torch.bfloat16, num_heads=1, head_dim=head_dim, device=device)
            counted_check(name, *tensors, True)
        counted_check(name, *tensors, False)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_warpgroup_has_tiles_of_its_own(name, head_dim):
    rows = BLOCK_ROWS[head_dim]
    with backend(name) as device:
        # Warpgroups that see no keys, one tile, two; tiles of queries are cut from the end, one has a single row
        for num_queries, num_keys in [(rows + 1, rows - 60), (rows, rows + 70), (rows, 100)]:
            tensors = inputs(num_queries, num_keys, torch.float16, num_heads=1, head_dim=head_dim, device=device)
            counted_check(name, *tensors, True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_blocks_go_from_item_to_item(name, head_dim, causal):
    # Emulated: 8 multiprocessors, 5 heads x 4 sequences x 1 or 2 tiles: blocks do 3 or 5 items, some of them empty
    lengths_q, lengths_k = [130, 5, 0, 70], [140, 129, 9, 30]
    with backend(name) as device:
        q, k, v = inputs(sum(lengths_q), sum(lengths_k), torch.bfloat16, num_heads=5, head_dim=head_dim, device=device)
        out, lse = counted(name, lambda: packed(q, k, v, lengths_q, lengths_k, causal=causal))
        parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), out.split(lengths_q), strict=True)
        for i, (a, b, c, result) in enumerate(parts):
            alone, alone_lse = packed(a, b, c, [len(a)], [len(b)], causal=causal)
            assert torch.equal(result, alone)
            assert torch.equal(lse[:, sum(lengths_q[:i]) : sum(lengths_q[: i + 1])], alone_lse)
            if i in (0, 3):
                check(a[:, 2:3], b[:, 2:3], c[:, 2:3], causal, f"sequence {i}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_neighbours_are_not_weighed(name, head_dim, causal):
    """Tiles reach into the next sequence, whose keys and values may be anything: not a bit changes."""
    lengths_q, lengths_k = [20, 3, 66], [130, 9, 70]
    with backend(name) as device:
        q, k, v = inputs(sum(lengths_q), sum(lengths_k), torch.bfloat16, num_heads=1, head_dim=head_dim, device=device)
        expected = packed(q, k, v, lengths_q, lengths_k, causal=causal)
        for bad in (float("nan"), float("inf")):
            k[130:139], v[130:139], q[20:23] = bad, bad, bad
            out = counted(name, lambda: packed(q, k, v, lengths_q, lengths_k, causal=causal))
            for i in range(2):
                rows = expected[i] if i == 0 else expected[i].T
                got = out[i] if i == 0 else out[i].T
                assert torch.equal(got[:20], rows[:20])
                assert torch.equal(got[23:], rows[23:])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 8), (64, 64), (64, 256), (128, 16), (128, 64), (128, 128)])
def test_pages_hold_what_contiguous_keys_do(name, head_dim, page_size):
    lengths_q, lengths_k = [17, 40], [139, 260]
    with backend(name) as device:
        q, k, v, *cache = paged.paged_inputs(
            lengths_q, lengths_k, torch.bfloat16, page_size=page_size, head_dim=head_dim, device=device
        )
        out = counted(name, lambda: paged.run(q, *cache, lengths_q))
        assert torch.equal(out, packed(q, k, v, lengths_q, lengths_k)[0])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_maximum_moves_with_later_tiles(name, head_dim):
    with backend(name) as device:
        q, k, v = inputs(66, 3 * KEY_TILE, torch.bfloat16, num_heads=1, head_dim=head_dim, device=device)
        k[:, :, 0] = torch.arange(len(k), device=device)[:, None] / 16
        q[:, :, 0] = 8.0
        counted_check(name, q, k, v, True)
        counted_check(name, q, k.flip(0), v, True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hidden_values_are_not_weighed(name, head_dim):
    flash.test_a_value_that_a_query_does_not_see_is_not_weighed(name, head_dim)


@pytest.mark.parametrize("name", [EMU_SM90])
def test_what_tma_cannot_address_is_left_to_the_kernel_for_any_gpu(name):
    with backend(name):
        q, k, v = inputs(20, 40, torch.bfloat16, num_heads=1)
        odd = torch.zeros(40, 1, 66, dtype=torch.bfloat16)[:, :, :64].copy_(k)
        pages = paged.paged_inputs([20], [40], torch.bfloat16, page_size=24)
        for run in (
            lambda: packed(q, odd, v, [20], [40]),
            lambda: packed(q, k, v, [20], [40], softmax_scale=-0.125),
            lambda: packed(q.float(), k.float(), v.float(), [20], [40]),
            lambda: paged.run(pages[0], *pages[3:], [20]),
        ):
            assert emulator_counts(run)["wgmmas"] == 0
        for scale in (0.0, 0.5):
            counted_check(name, q, k, v, True, softmax_scale=scale)
