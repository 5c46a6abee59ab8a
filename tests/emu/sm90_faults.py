"""Mistakes with the instructions of sm_90a that the emulator must find (sm90_faults.cu, sm90_gemm.cu)."""

from __future__ import annotations

from fault import AT, THREAD, Fault

# enum Mistake of sm90_gemm.cu
(
    NO_WGMMA_FENCE, TOO_FEW_BYTES, TOO_MANY_BYTES, WRONG_PARITY, EARLY_RELEASE, NO_RELEASE, FIRST_LAP_NOT_WAITED,
    NO_WAIT_FOR_EMPTY, NO_BARRIER_AFTER_INIT, NO_FENCE_AFTER_INIT, NO_COMMIT, LAST_GROUP_NOT_WAITED,
    ONE_WARP_DOES_NOT_WAIT, EARLY_READ,
) = range(1, 15)  # fmt: skip
# enums of sm90_cluster.cu
NO_FIRST_BARRIER, NO_LAST_BARRIER, WRONG_RANK, UNMAPPED_ADDRESS, ARRIVE_TWICE, WRITES_AGAIN = range(1, 7)
NO_CLUSTER_BARRIER, RELEASES_OWN_BLOCK, WAITS_FOR_OWN_BLOCK, ENDS_EARLY, WRONG_MASK = range(1, 6)
# enums of sm90_faults.cu
(
    NO_WAIT, NO_TENSOR_MAP, TENSOR_RANK, MISALIGNED, BEYOND_THE_ARRAY, TOO_FEW_BYTES_LOADED, NEVER_WAITED, TWO_LOADS,
    NO_FENCE_BEFORE,
) = range(1, 10)  # fmt: skip
NO_PROXY_FENCE, OVERWRITTEN, NOT_WAITED, NO_STORE_COMMIT, READ_TOO_EARLY = range(1, 6)
MISSING_PROXY_FENCE, DIFFERS, OUT_OF_BOUNDS, REGISTERS_REPLACED = range(1, 5)
TOO_MANY, UP_IS_DOWN, ONE_WARP, TWO_NUMBERS, NO_MULTIPLE = range(1, 6)

RING = r"at sm90_ring\.h:\d+"  # where the barriers of a product are made
FLIGHT = rf"touches data in flight: byte \d+ of .*; the TMA load issued {AT} has not arrived"
IN_FLIGHT = rf"wgmma {FLIGHT}; {AT}; {THREAD}"
WAITS = r"deadlock; .*waits in mbarrier.try_wait"
RACE = r"data race: {} of size \d+ by {}.*, Previous {} of size \d+ by {}.*; {}".format
TMA, PROXY_OF_WGMMA = r"TMA \(issued at", r"the async proxy \(wgmma at"
PROXY_OF_LOAD, PROXY_OF_STORE = r"the async proxy \(TMA load at", r"the async proxy \(TMA store at"


def gemm(mistake: int, message: str) -> Fault:
    return Fault("gemm", message, mistake, 90)


def sm90(case: str, message: str, number: int = 0) -> Fault:
    return Fault(case, message, number, 90)


FAULTS = {
    "plain": [
        gemm(NO_WGMMA_FENCE, rf"wgmma without a wgmma.fence after its registers were last touched; {AT}; {THREAD}"),
        gemm(TOO_FEW_BYTES, IN_FLIGHT),
        gemm(TOO_MANY_BYTES, rf"{WAITS} \(phase 0: 0 of 1 arrivals and 16 bytes are missing\) {AT}"),
        gemm(WRONG_PARITY, IN_FLIGHT),
        gemm(EARLY_RELEASE, IN_FLIGHT),
        gemm(NO_RELEASE, rf"{WAITS} \(phase 0: 1 of 1 arrivals and 0 bytes are missing\) {AT}"),
        gemm(FIRST_LAP_NOT_WAITED, rf"{WAITS} \(phase 0: 1 of 1 arrivals and 0 bytes are missing\) {AT}"),
        gemm(NO_WAIT_FOR_EMPTY, rf"expect_tx: more arrivals on the mbarrier \(initialised {RING}\) than its count, 1"),
        gemm(NO_FENCE_AFTER_INIT, rf"the init of its mbarrier {RING} was not followed by fence.mbarrier_init; {AT}"),
        gemm(NO_COMMIT, IN_FLIGHT),
        gemm(LAST_GROUP_NOT_WAITED, rf"a thread has returned and not waited for its wgmma; {AT}; {THREAD}"),
        sm90("mbarrier_uninitialised", rf"mbarrier.arrive: the mbarrier at shared address 0x\w+ is not init.*{AT}"),
        sm90("mbarrier_overwritten", rf"mbarrier.arrive: the mbarrier initialised {AT} was overwritten; {AT}"),
        sm90("mbarrier_made_twice", rf"mbarrier.init: already initialised {AT}; {AT}"),
        sm90("mbarrier_count", rf"mbarrier.init: count 0; 1 to 32767 are allowed here; {AT}"),
        sm90("mbarrier_parity", rf"mbarrier.try_wait: parity 3; it is 0 or 1; {AT}"),
        sm90("tma_load", rf"TMA load: no tensor map lies at 0x\w+; {AT}", NO_TENSOR_MAP),
        sm90("tma_load", rf"TMA load: 3 coordinates for a tensor of 2 dimensions; {AT}", TENSOR_RANK),
        sm90("tma_load", rf"TMA load: shared address 0x\w+ is not 1024-byte aligned; {AT}", MISALIGNED),
        sm90("tma_load", r"TMA load: out of bounds: 8192 bytes at byte 9216 of .* of 16384 bytes", BEYOND_THE_ARRAY),
        sm90("tma_load", rf"TMA load: 8176 bytes more than were announced .*initialised {AT}\); {AT}",
             TOO_FEW_BYTES_LOADED),
        sm90("tma_load", rf"the block ends while a TMA load of its shared memory is in flight.*; {AT}", NEVER_WAITED),
        sm90("tma_load", rf"TMA load {FLIGHT}; {AT}", TWO_LOADS),
        sm90("tma_store", rf"the block ends while a TMA store of its shared memory is in flight.*; {AT}", NOT_WAITED),
        sm90("tma_store", rf"the block ends while a TMA store of its shared memory .*; {AT}", NO_STORE_COMMIT),
        sm90("product", rf"wgmma differs between the threads .*: another one issues that {AT}; {AT}", DIFFERS),
        sm90("product", rf"wgmma: out of bounds: 16 bytes at 0 bytes behind the end of .*; {AT}", OUT_OF_BOUNDS),
        sm90("registers", rf"deadlock; .*waits in setmaxnreg.inc \(others must give up registers\) {AT}", TOO_MANY),
        sm90("registers", rf"setmaxnreg.dec: from 168 registers to 232; {AT}", UP_IS_DOWN),
        sm90("registers", r"executed by some warps of a warpgroup only \(1, 0, 0 and 0 times\)", ONE_WARP),
        sm90("registers", rf"another warp of the warpgroup wants \d+; {AT}", TWO_NUMBERS),
        sm90("registers", rf"setmaxnreg.dec: 36 registers; multiples of 8 from 24 to 256 are .*; {AT}", NO_MULTIPLE),
        sm90("cluster_too_large", "a cluster of 9 blocks; 1 to 8 are allowed"),
        sm90("cluster_not_whole", "a grid of 3 blocks in x is not whole clusters of 2"),
        sm90("shared_too_large_for_sm90", r"232464 bytes of dynamic shared memory; a block may use 232448 \(sm_90\)"),
        sm90("wrong_architecture", "a kernel for sm_90a, launched on sm_80"),
        sm90("cluster_wait_without_arrive", rf"barrier.cluster.wait: the thread has not arrived; {AT}"),
        sm90("cluster_exchange", rf"ld.shared::cluster: out of bounds: 4 bytes at .* no array; {AT}", NO_FIRST_BARRIER),
        sm90("cluster_exchange", rf"block \d of the cluster has ended, and its shared memory .*{AT}", NO_LAST_BARRIER),
        sm90("cluster_exchange", rf"mapa: block 2 of a cluster of 2; {AT}", WRONG_RANK),
        sm90("cluster_exchange", rf"address 0x\w+ is not one that mapa has given; {AT}", UNMAPPED_ADDRESS),
        sm90("cluster_exchange", rf"cluster.arrive: the thread has arrived {AT} and not waited; {AT}", ARRIVE_TWICE),
        sm90("cluster_gemm", rf"TMA load: .* no array; {AT}; block \(1,0,0\)", NO_CLUSTER_BARRIER),
        sm90("cluster_gemm", rf"{WAITS} \(phase 0: 1 of 2 arrivals and 0 bytes are missing\) {AT}", RELEASES_OWN_BLOCK),
        sm90("cluster_gemm", rf"TMA load {FLIGHT}; {AT}", WAITS_FOR_OWN_BLOCK),
        sm90("cluster_gemm", rf"arrive.shared::cluster: block \d of the cluster has ended.*; {AT}", ENDS_EARLY),
        sm90("cluster_gemm", rf"{WAITS} \(phase 0: 0 of 1 arrivals and 8192 bytes are missing\) {AT}", WRONG_MASK),
    ],
    "asan": [
        sm90("tma_load", rf"read of 4 bytes {AT} {FLIGHT}; {THREAD}", NO_WAIT),
        sm90("tma_beyond_the_allocation", rf"TMA load: out of bounds: 128 bytes of global memory at .*; {AT}"),
    ],
    "tsan": [
        gemm(NO_BARRIER_AFTER_INIT, RACE("Read", "block", "write", r".* thread \(128,0,0\)", AT)),
        gemm(EARLY_RELEASE, RACE("Write", TMA, "read", "", AT)),
        gemm(ONE_WARP_DOES_NOT_WAIT, RACE("Write", TMA, "read", "block", AT)),
        sm90("product", RACE("Read", PROXY_OF_WGMMA, "write", "block", AT), MISSING_PROXY_FENCE),
        sm90("tma_load", RACE("Read", rf"block .* {AT}", "write", TMA, ""), NO_WAIT),
        sm90("tma_load", RACE("Read", PROXY_OF_LOAD, "write", "block", AT), NO_FENCE_BEFORE),
        sm90("tma_store", RACE("Read", PROXY_OF_STORE, "write", "block", AT), NO_PROXY_FENCE),
        sm90("tma_store", RACE("Write", "block", "read", PROXY_OF_STORE, ""), OVERWRITTEN),
        sm90("tma_store", RACE("Read", "block", "write", TMA, ""), READ_TOO_EARLY),
        sm90("cluster_exchange", RACE("Write", rf"block .* {AT}", "read", "block", ""), WRITES_AGAIN),
    ],
}  # fmt: skip
