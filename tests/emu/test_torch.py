"""The emulator as torch sees it: torch.ops.persimmon_fast_emu."""

from __future__ import annotations

import threading

import emulator
import pytest
import torch

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=f"no emulator: {emulator.missing()}")


@pytest.fixture
def emulated():
    if emulator.variant() != "plain":
        pytest.skip("one variant is enough")
    emulator.load()
    ops = torch.ops.persimmon_fast_emu
    yield ops
    ops.configure("fifo", "late", 1, 1)


def layer_norm(emulated) -> torch.Tensor:
    x = torch.arange(96.0).reshape(3, 32)
    return emulated.layer_norm(x, torch.ones(32), torch.zeros(32), 1e-5)


def test_counts_grow(emulated):
    before = emulated.stats()
    layer_norm(emulated)
    after = emulated.stats()
    assert after["launches"] == before["launches"] + 1
    assert after["blocks"] > before["blocks"]
    assert after["warp_operations"] > before["warp_operations"]


def test_results_do_not_depend_on_the_schedule(emulated):
    expected = torch.nn.functional.layer_norm(torch.arange(96.0).reshape(3, 32), (32,))
    for sched in ("fifo", "reverse", "random", "warp", "pct"):
        emulated.configure(sched, "late", 1, 0)
        torch.testing.assert_close(layer_norm(emulated), expected)


def test_unknown_setting_is_refused(emulated):
    with pytest.raises(ValueError, match="sched must be fifo, reverse, random, warp or pct, got 'lifo'"):
        emulated.configure("lifo", "late", 1, 1)


def test_threads_of_the_host_take_turns(emulated):
    expected = layer_norm(emulated)
    equal = []

    def work() -> None:
        equal.extend(torch.equal(layer_norm(emulated), expected) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 80
