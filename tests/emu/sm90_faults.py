"""Mistakes with the instructions of sm_90a that the emulator must find (sm90_faults.cu, sm90_gemm.cu)."""

from __future__ import annotations

from fault import AT, THREAD, Fault

# enum Mistake of sm90_gemm.cu
(
    NO_WGMMA_FENCE, TOO_FEW_BYTES, TOO_MANY_BYTES, WRONG_PARITY, EARLY_RELEASE, NO_RELEASE, FIRST_LAP_NOT_WAITED,
    NO_WAIT_FOR_EMPTY, NO_BARRIER_AFTER_INIT, NO_FENCE_AFTER_INIT, NO_COMMIT, LAST_GROUP_NOT_WAITED,
    ONE_WARP_DOES_NOT_WAIT, EARLY_READ,
) = range(1, 15)  # fmt: skip
IN_FLIGHT = rf"wgmma touches data in flight: byte \d+ of .*; the TMA load issued {AT} has not arrived; {AT}; {THREAD}"
WAITS = r"deadlock; .*waits in mbarrier.try_wait"


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
        gemm(FIRST_LAP_NOT_WAITED, rf"{IN_FLIGHT}|{WAITS}"),
        gemm(NO_WAIT_FOR_EMPTY, rf"expect_tx: more arrivals on the mbarrier \(initialised {AT}\) than its count, 1"),
        gemm(NO_FENCE_AFTER_INIT, rf"the init of its mbarrier {AT} was not followed by fence.mbarrier_init; {AT}"),
        gemm(NO_COMMIT, rf"{IN_FLIGHT}|a thread has returned and not waited for its wgmma; {AT}"),
        gemm(LAST_GROUP_NOT_WAITED, rf"a thread has returned and not waited for its wgmma; {AT}; {THREAD}"),
    ],
    "asan": [],
    "tsan": [
        gemm(NO_BARRIER_AFTER_INIT, r"data race: Read of size 8 by .*, Previous write of .* thread \(128,0,0\)"),
        gemm(EARLY_RELEASE, rf"data race: Write .*, Previous read of size 8 by the async proxy \(wgmma {AT}\)"),
        gemm(ONE_WARP_DOES_NOT_WAIT, r"data race: Write .* thread \(128,0,0\), Previous read of size 8 by block"),
        sm90("missing_proxy_fence", rf"data race: Read of size \d+ by the async proxy \(wgmma {AT}\)"),
    ],
}  # fmt: skip
