"""Every mistake that the emulator must find, in the configuration that must find it.

Each case runs three times: correct, with the mistake, and correct again. So none is an alarm without cause, and the
process stays usable after a fault.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import emulator
import kernel_library
import numpy as np
import pytest
import sm90_faults
from fault import AT, THREAD, Fault

PLAIN = {"sched": "reverse", "async_policy": "late"}
ASAN = {"sched": "fifo", "async_policy": "late"}
TSAN = {"sched": "fifo", "async_policy": "late", "resident": 0}


WRITE, READ = r"[Ww]rite of size 4 by block \(\d,0,0\) thread \(\d+,0,0\) ", r"[Rr]ead of size 4 by block \(\d,0,0\)"

FAULTS = {
    "plain": [
        Fault("divergent_barrier", rf"divergent barrier: other threads .* wait in the __syncthreads\(\) {AT}; {AT}"),
        Fault("uneven_rounds", rf"divergent barrier: .*{AT}"),
        Fault("deadlock", rf"deadlock; block \(0,0,0\) thread \(0,0,0\) waits in bar.sync {AT}"),
        Fault("livelock", rf"livelock: threads that poll a value which nobody changes: 1, resident blocks: 1; {AT}"),
        Fault("divergent_shuffle", rf"divergent warp operation: other lanes of mask 0xffffffff are {AT}; {AT}"),
        Fault("exited_lane", rf"mask 0xffffffff names lanes that have exited .*running: 0x0000ffff.*{AT}; {THREAD}"),
        Fault("lane_leaves_others_waiting", rf"a lane has returned while others of mask 0xffffffff wait .*{AT}"),
        Fault("lane_not_in_mask", rf"the calling lane is not in its own mask 0xfffffffe; {AT}"),
        Fault("shuffle_from_outside_the_mask", rf"reads lane 20, which is not in mask 0x0000ffff; {AT}"),
        Fault("shared_write_behind", rf"wrote 0 bytes behind the end of the shared array of 256 bytes taken; {AT}"),
        Fault("shared_write_before", rf"wrote 1 bytes before the start of the shared array of 256 bytes taken; {AT}"),
        Fault("threads_disagree_on_layout", rf"threads disagree on the layout .* 32 bytes here, 64 bytes {AT}; {AT}"),
        Fault("array_beyond_the_launch", rf"this array ends at byte 1028, but the launch gave 1024 bytes; {AT}"),
        Fault("not_shared", rf"smem_u32: 0x\w+ is no address of the block's shared memory; {AT}"),
        Fault("static_shared_too_large", rf"49168 bytes of static shared memory; at most 49152 are allowed; {AT}"),
        Fault("dynamic_shared_too_large", "101392 bytes of dynamic shared memory; a block may use 101376"),
        Fault("static_and_dynamic_too_large", "9232 bytes of static and 92160 bytes of dynamic .* may use 101376"),
        Fault("block_too_large", r"a block of \(1025,1,1\) threads; 1 to 1024 are allowed"),
        Fault("grid_too_large", r"a grid of \(1,65536,1\) blocks; .* at most \(2147483647,65535,65535\)"),
        Fault("grid_empty", r"a grid of \(1,0,1\) blocks; at least 1"),
        Fault(
            "ldmatrix_out_of_bounds", rf"ldmatrix: out of bounds: 16 bytes at 0 bytes behind the end .*{AT}; {THREAD}"
        ),
        Fault("ldmatrix_misaligned", rf"ldmatrix: shared address 0x\w+ is not 16-byte aligned; {AT}"),
        Fault("cp_async_misaligned", rf"cp.async: global address 0x\w+ is not 16-byte aligned; {AT}"),
        Fault("two_copies_to_one_place", rf"cp.async touches data in flight: .* cp.async of thread 0, issued {AT}"),
        Fault(
            "wrong_wait_count_ldmatrix", rf"ldmatrix touches data in flight: byte 0 of .* has not been waited for; {AT}"
        ),
        Fault("null_pointer", rf"invalid memory access before its first .*null pointer \(address \(nil\)\); {THREAD}"),
        Fault("stack_overflow", r"invalid memory access .*: local variables exceed the emulator's stack"),
        Fault("misaligned_atomic", rf"atomicAdd: address 0x\w+ is not 4-byte aligned; {AT}"),
        Fault("dependent_launch", "no thread executes griddepcontrol.wait"),
    ],
    "asan": [
        Fault("shared_write_behind", rf"out of bounds: write of 4 bytes, 0 bytes behind the end of the shared .*{AT}"),
        Fault("shared_write_before", rf"out of bounds: write of 4 bytes, 4 bytes before the start of the .*{AT}"),
        Fault("shared_read_behind", rf"out of bounds: read of 4 bytes, 0 bytes behind the end of .*{AT}; {THREAD}"),
        Fault(
            "wrong_wait_count", rf"read of 4 bytes {AT} touches data in flight: .*cp.async of thread \d+, issued {AT}"
        ),
        Fault("cp_async_out_of_bounds", rf"cp.async: out of bounds: 16 bytes of global memory at 0x\w+; {AT}"),
        Fault(
            "global_read_behind", rf"out of bounds: read of 4 bytes, 0 bytes behind .* of 2048 bytes; {AT}; {THREAD}"
        ),
        Fault("global_write_behind", rf"out of bounds: write of 4 bytes, 0 bytes behind .* of 2048 bytes; {AT}"),
        Fault("null_pointer", rf"undefined behaviour: null pointer to 'int' is used; {AT}"),
        Fault(
            "misaligned_vector",
            rf"undefined behaviour: misaligned: 0x\w+ is not 16-byte aligned, as .*float4' must be; {AT}",
        ),
        Fault("integer_overflow", rf"signed integer overflow in an addition; {AT}; {THREAD}"),
    ],
    "tsan": [
        Fault("missing_barrier", rf"data race: {WRITE}{AT}, Previous {READ}.*{AT}"),
        Fault("missing_barrier_before_reuse", rf"data race: .*{AT}, Previous .*{AT}"),
        Fault("missing_barrier_after_wait", rf"data race: Write of size 8 by .*, Previous {READ}.*{AT}"),
        Fault("race_in_block", rf"data race: {READ}.*{AT}, Previous {WRITE}{AT}"),
        Fault("race_between_blocks", rf"data race: {READ}.*{AT}, Previous {WRITE}{AT}"),
        Fault("last_block", rf"data race: {READ}.*{AT}, Previous {WRITE}{AT}", 0),
        Fault("last_block", rf"data race: {READ}.*{AT}, Previous {WRITE}{AT}", 1),
        Fault("last_block", rf"data race: .*{AT}, Previous .*{AT}", 2),
        Fault("plain_read_of_a_flag", rf"data race: {READ}.*{AT}, Previous atomic write of size 4 by block"),
        Fault("relaxed_message", rf"data race: {READ}.*{AT}, Previous {WRITE}{AT}"),
        Fault("dependent_launch", rf"emulated kernel consume: data race: {READ}.*{AT}, Previous {WRITE}{AT}", 2),
        Fault("dependent_launch", rf"emulated kernel consume: data race: {WRITE}{AT}, Previous {READ}.*{AT}", 3),
    ],
}
for _variant, _faults in sm90_faults.FAULTS.items():
    FAULTS[_variant] += _faults
CONFIGURATIONS = {"plain": PLAIN, "asan": ASAN, "tsan": TSAN}
ALL = [(variant, fault) for variant, faults in FAULTS.items() for fault in faults]


@pytest.fixture(scope="session")
def outcomes(plain_path):
    """variant -> per fault the three messages. One process per variant, as a sanitizer must be preloaded."""
    results = {}
    for variant, faults in FAULTS.items():
        settings = [
            [fault.case, fault.number, CONFIGURATIONS[variant] | {"architecture": fault.architecture}]
            for fault in faults
        ]
        library = kernel_library.build(variant)
        run = subprocess.run(
            [sys.executable, kernel_library.__file__, str(library), json.dumps(settings)],
            env=os.environ | emulator.sanitizer_environment(variant), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode in (0, 66), f"{variant}: exit code {run.returncode}\n{run.stderr[-8000:]}"  # 66: races
        results[variant] = dict(zip(faults, json.loads(run.stdout), strict=True))
    return results


@pytest.mark.parametrize(("variant", "fault"), ALL, ids=[f"{v}-{f.case}-{f.number}" for v, f in ALL])
def test_fault_is_found(outcomes, variant, fault):
    correct, broken, correct_again = outcomes[variant][fault]
    assert correct is None
    assert broken is not None, "not found"
    assert re.search(fault.message, broken), broken
    assert f"kernel {fault.case}: " in broken or fault.case == "dependent_launch"
    assert correct_again is None


@pytest.mark.parametrize("case", ["missing_barrier", "missing_barrier_before_reuse"])
def test_reverse_order_shows_a_missing_barrier_by_value(library, case):
    results = {}
    for sched in ("fifo", "reverse"):
        for broken in (False, True):
            library.configure(sched)
            message, arrays = kernel_library.run_fault(library, case, 0, broken)
            assert message is None
            results[sched, broken] = arrays[0].copy()
    np.testing.assert_array_equal(results["fifo", False], results["reverse", False])
    assert (results["reverse", True] != results["reverse", False]).any()


@pytest.mark.parametrize(("case", "array"), [("uninitialised_shared", 0), ("wrong_wait_count", 1)])
def test_data_that_is_not_there_is_nan(library, case, array):
    for broken in (False, True):
        message, arrays = kernel_library.run_fault(library, case, 0, broken)
        assert message is None
        assert np.isnan(arrays[array].view(np.float32)).any() == broken


def test_many_faults_leak_no_stacks(library):
    """Stacks of abandoned threads are used again."""

    def mapped_bytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * 4096

    kernel_library.run_fault(library, "deadlock", 0, True)
    before = mapped_bytes()
    for _ in range(50):
        assert kernel_library.run_fault(library, "deadlock", 0, True)[0] is not None
    assert mapped_bytes() - before < 1 << 20  # 64 stacks of 128 KB each, 50 times, would be 400 MB
