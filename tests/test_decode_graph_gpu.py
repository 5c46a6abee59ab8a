"""The captured decode step on a GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from test_decode_graph import HEAD_DIM_64, MODES, STOP_IDS, assert_same_bits, generate, make_model

from persimmon_fast import PersimmonForCausalLM, decode_graph
from persimmon_fast.decode_graph import DecodeGraphs

pytestmark = pytest.mark.cuda


@pytest.fixture
def on_gpu() -> PersimmonForCausalLM:
    return make_model(**HEAD_DIM_64, max_position_embeddings=2048).bfloat16().to("cuda")


@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_replays_give_the_bits_of_running_op_by_op(on_gpu, mode):
    settings = MODES[mode] | {"max_new_tokens": 1002}
    expected = generate(on_gpu, 3, "cuda", use_cuda_graph=False, **settings)
    for _ in range(2):  # the second call replays what the first captured
        assert_same_bits(generate(on_gpu, 3, "cuda", **settings), expected)
    assert [type(graph) for graph in on_gpu.decode_graphs._graphs.values()] == [torch.cuda.CUDAGraph]


@pytest.mark.parametrize("mode", MODES)
def test_rows_stop_on_a_gpu(on_gpu, mode):
    on_gpu.float()  # the rounding of 16 bits may depend on the number of rows
    settings = MODES[mode] | {"eos_token_id": STOP_IDS}
    free = generate(on_gpu, 8, "cuda", **MODES[mode])
    out = generate(on_gpu, 8, "cuda", **settings)
    assert len(set(out.num_new_tokens)) > 2
    for row, n in enumerate(out.num_new_tokens):
        assert torch.equal(out.sequences[row, : 40 + n], free.sequences[row, : 40 + n])
        assert out.sequences[row, 39 + n] in torch.tensor(STOP_IDS, device="cuda") or n == 40


def test_a_failed_capture_leaves_the_gpu_usable(on_gpu):
    expected = generate(on_gpu, 2, "cuda", use_cuda_graph=False)
    stream = torch.cuda.current_stream()
    on_gpu.decode_graphs = DecodeGraphs(
        lambda device: lambda run: decode_graph.CudaGraphCapture(device)(lambda: (run(), expected.logprobs.tolist()))
    )
    with pytest.warns(UserWarning, match="op by op, not as one CUDA graph: the capture failed"):
        assert_same_bits(generate(on_gpu, 2, "cuda"), expected)
    assert torch.cuda.current_stream() == stream
    on_gpu.decode_graphs = DecodeGraphs()
    assert_same_bits(generate(on_gpu, 2, "cuda"), expected)
    assert None not in on_gpu.decode_graphs._graphs.values()


def test_calls_on_other_streams_follow_one_another(on_gpu):
    expected = generate(on_gpu, 2, "cuda", eos_token_id=STOP_IDS)
    for _ in range(5):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert_same_bits(generate(on_gpu, 2, "cuda", eos_token_id=STOP_IDS), expected)


def test_torch_generator_is_left_alone(on_gpu):
    generate(on_gpu, 1, "cuda", do_sample=True, seed=1)
    torch.manual_seed(5)
    expected = torch.rand(4, device="cuda")
    torch.manual_seed(5)
    generate(on_gpu, 1, "cuda", do_sample=True, seed=1)
    assert torch.equal(torch.rand(4, device="cuda"), expected)


def test_free_returns_the_memory(on_gpu):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    generate(on_gpu, 4, "cuda")
    cache = on_gpu.decode_graphs._cache
    assert torch.cuda.memory_allocated() - before >= cache.nbytes()
    nbytes = cache.nbytes()
    del cache
    on_gpu.decode_graphs.free()
    gc.collect()
    assert torch.cuda.memory_allocated() - before < nbytes
