"""Mistakes with the instructions of sm_90a that show in values alone; settings of the architecture."""

from __future__ import annotations

import kernel_library
import numpy as np
import pytest
import sm90_faults


@pytest.fixture
def sm90(library):
    library.configure(architecture=90)
    return library


def test_registers_of_a_are_read_late(sm90):
    """A thread may write them after the wait. Where it does before, the 8 products of one register are lost."""
    for broken, expected in ((False, 32), (True, 24)):
        message, arrays = kernel_library.run_fault(sm90, "product", sm90_faults.REGISTERS_REPLACED, broken)
        assert message is None
        assert arrays[0].view(np.float32)[0] == expected


def test_accumulators_are_nan_until_the_wait(sm90):
    for broken in (False, True):
        message, arrays = kernel_library.run_fault(sm90, "gemm", sm90_faults.EARLY_READ, broken)
        assert message is None
        assert np.isnan(arrays[3].view(np.float32)[:128]).all() == broken


def test_tma_store_reads_late(sm90):
    for broken, expected in ((False, 0), (True, 77)):
        message, arrays = kernel_library.run_fault(sm90, "tma_store", sm90_faults.OVERWRITTEN, broken)
        assert message is None
        assert arrays[0][0] == expected


def test_unknown_architecture_is_refused(library):
    with pytest.raises(ValueError, match="architecture must be 80 or 90, got 89"):
        library.configure(architecture=89)
