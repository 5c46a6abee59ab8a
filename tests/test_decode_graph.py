"""The decode step on static tensors, run op by op and captured; the capture is recorded on a CPU, real on a GPU."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from helpers import CUDA, EMU, backend, tiny_config
from recorded_graph import RecordedGraph

from persimmon_fast import PersimmonForCausalLM, decode_graph
from persimmon_fast.decode_graph import DecodeGraphs
from persimmon_fast.decode_step import DecodeStep
from persimmon_fast.decoding import LookupDecoder
from persimmon_fast.prompt_lookup import PromptLookup

MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 3, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"repetition_penalty": 1.3},
    "sampled and penalised": {"do_sample": True, "seed": 4, "temperature": 1.5, "repetition_penalty": 1.2},
}
STOP_IDS = list(range(5, 160, 12))
DYNAMIC = {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}


def make_model(**changes: object) -> PersimmonForCausalLM:
    """Random weights, large enough that greedy text does not soon repeat one token."""
    torch.manual_seed(0)
    model = PersimmonForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn_like(parameter)
            parameter.copy_(1 + noise if "layernorm.weight" in name else noise)
    return model


class Recorder:
    """Captures by recording; counts what it captures."""

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    def __call__(self, device: torch.device) -> Recorder:
        return Recorder.on_device(self)

    def on_device(self):
        def capture(run):
            self.graphs.append(RecordedGraph(run))
            return self.graphs[-1]

        return capture


@pytest.fixture
def model() -> PersimmonForCausalLM:
    return make_model()


@pytest.fixture
def recorder(model) -> Recorder:
    """What the model's steps are captured with."""
    recorder = Recorder()
    model.decode_graphs = DecodeGraphs(recorder)
    return recorder


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def prompts(batch_size: int, length: int = 40) -> dict[str, torch.Tensor]:
    """Prompts with left padding, a different amount in each row."""
    ids = torch.randint(3, 160, (batch_size, length), generator=torch.Generator().manual_seed(batch_size))
    mask = (torch.arange(length) >= (7 * torch.arange(batch_size) % (length - 1)).unsqueeze(1)).long()
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, batch_size, device="cpu", length=40, **settings):
    settings = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0} | settings
    inputs = {name: tensor.to(device) for name, tensor in prompts(batch_size, length).items()}
    return model.generate(**inputs, return_dict_in_generate=True, **settings)


def assert_same_bits(actual, expected) -> None:
    assert actual.num_new_tokens == expected.num_new_tokens
    assert torch.equal(actual.sequences.cpu(), expected.sequences.cpu())
    assert torch.equal(actual.logprobs.cpu(), expected.logprobs.cpu())


def host_driven(model, *arguments, **settings):
    """What the path of prompt lookup generates without drafts: each step is made from values on the host."""

    def run_step(self, active):
        return self._choose(self._forward([[s.tokens[-1]] for s in active]), active)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptLookup, "draft", lambda *_: [])
        patch.setattr(LookupDecoder, "_run_step", run_step)  # which would run the step that is tested
        return generate(model, *arguments, prompt_lookup_num_tokens=1, **settings)


# ---- the step ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_steps_driven_by_the_host(model, mode, batch_size, dtype):
    model = model.to(dtype)
    for settings in ({}, {"num_return_sequences": 3}, {"eos_token_id": STOP_IDS}):
        settings = MODES[mode] | settings
        assert_same_bits(generate(model, batch_size, **settings), host_driven(model, batch_size, **settings))


def test_sequences_do_stop_at_different_steps_here(model):
    assert len(set(generate(model, 5, eos_token_id=STOP_IDS).num_new_tokens)) > 2


def test_a_rotary_table_that_changes_with_the_length():
    model = make_model(**DYNAMIC)
    for settings in ({}, {"eos_token_id": STOP_IDS}):
        assert_same_bits(generate(model, 3, **settings), host_driven(model, 3, **settings))


def test_the_rotary_table_stays_where_it_is():
    rotary = make_model(max_position_embeddings=8192).model.rotary
    table = rotary(8000, torch.device("cpu"))
    assert rotary(10, torch.device("cpu")) is table
    assert rotary(8192, torch.device("cpu")) is table


def test_embeddings_have_no_ids_to_penalise(model):
    ids = prompts(2)["input_ids"]
    settings = {"repetition_penalty": 1.3, "max_new_tokens": 20, "eos_token_id": None}
    out = model.generate(inputs_embeds=model.model.embed_tokens(ids), **settings)

    def run_step(self, active):
        return self._choose(self._forward([[s.tokens[-1]] for s in active]), active)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptLookup, "draft", lambda *_: [])
        patch.setattr(LookupDecoder, "_run_step", run_step)  # which would run the step that is tested
        expected = model.generate(inputs_embeds=model.model.embed_tokens(ids), prompt_lookup_num_tokens=1, **settings)
    assert torch.equal(out, expected)
    assert not torch.equal(out, model.generate(ids, **settings)[:, ids.shape[1] :])


HEAD_DIM_64 = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}


@pytest.mark.parametrize("name", [EMU, CUDA])
@pytest.mark.parametrize("mode", ["greedy", "sampled and penalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_steps_driven_by_the_host_on_cuda_kernels(name, mode, dtype):
    model = make_model(**HEAD_DIM_64).to(dtype)
    with backend(name) as device:
        model = model.to(device)
        settings = MODES[mode] | {"max_new_tokens": 6, "use_cuda_graph": False}
        assert_same_bits(generate(model, 2, device, **settings), host_driven(model, 2, device, **settings))


@pytest.mark.parametrize("name", [EMU, CUDA])
def test_keys_that_begin_to_be_split_on_cuda_kernels(name):
    model = make_model(**HEAD_DIM_64 | {"num_hidden_layers": 1, "max_position_embeddings": 512}).bfloat16()
    model.decode_graphs = DecodeGraphs(Recorder())
    with backend(name) as device:
        model = model.to(device)
        settings = {"max_new_tokens": 6, "length": 253}  # the second split comes with the 256th key
        expected = host_driven(model, 1, device, **settings)
        assert_same_bits(generate(model, 1, device, use_cuda_graph=False, **settings), expected)
        assert_same_bits(generate(model, 1, device, **settings), expected)


# ---- captured ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_replays_give_the_bits_of_running_op_by_op(model, recorder, mode, batch_size):
    for settings in ({}, {"num_return_sequences": 3}):
        settings = MODES[mode] | settings
        expected = generate(model, batch_size, use_cuda_graph=False, **settings)
        assert not recorder.graphs or settings != MODES[mode]
        assert_same_bits(generate(model, batch_size, **settings), expected)
    # the first token comes from the prompt, the second from the step that runs op by op
    assert [graph.num_replays for graph in recorder.graphs] == [38, 38]


@pytest.mark.parametrize("mode", MODES)
def test_stopped_rows_change_no_other_row(model, recorder, mode):
    settings = MODES[mode] | {"eos_token_id": STOP_IDS}
    expected = generate(model, 8, use_cuda_graph=False, **settings)
    assert len(set(expected.num_new_tokens)) > 2
    assert_same_bits(generate(model, 8, **settings), expected)
    # half of the rows, or less, take a smaller graph
    sizes = sorted({step.batch_size for step in model.decode_graphs._steps.values()}, reverse=True)
    assert sizes[0] == 8
    assert len(sizes) > 1
    assert all(small <= large // 2 for large, small in itertools.pairwise(sizes))


@pytest.mark.parametrize("name", [EMU])
def test_replays_on_the_cuda_kernels(name):
    model = make_model(**HEAD_DIM_64).bfloat16()
    recorder = Recorder()
    model.decode_graphs = DecodeGraphs(recorder)
    with backend(name):
        settings = MODES["sampled and penalised"] | {"max_new_tokens": 6}
        assert_same_bits(generate(model, 2, **settings), generate(model, 2, use_cuda_graph=False, **settings))
    assert [graph.num_replays for graph in recorder.graphs] == [4]


def test_a_batch_size_is_captured_once(model, recorder):
    first = generate(model, 3)
    assert len(recorder.graphs) == 1
    for settings in ({}, {"length": 20}, {"max_new_tokens": 10, "eos_token_id": STOP_IDS[0]}):
        expected = generate(model, 3, use_cuda_graph=False, **settings)
        assert_same_bits(generate(model, 3, **settings), expected)
    sampled = [MODES["sampled"] | {"seed": seed, "temperature": 0.5 * seed} for seed in (1, 2)]
    for settings in sampled:
        assert_same_bits(generate(model, 3, **settings), generate(model, 3, use_cuda_graph=False, **settings))
    assert len(recorder.graphs) == 2  # greedy and sampled
    generate(model, 2)
    assert len(recorder.graphs) == 3
    assert_same_bits(generate(model, 3), first)
    assert len(recorder.graphs) == 3


def test_a_larger_pool_is_captured_again():
    model, recorder = make_model(max_position_embeddings=1024), Recorder()
    model.decode_graphs = DecodeGraphs(recorder)
    generate(model, 1, max_new_tokens=10)
    cache = model.decode_graphs._cache
    generate(model, 1, max_new_tokens=150)  # a little longer, as the next turn of a chat
    assert model.decode_graphs._cache is cache
    assert len(recorder.graphs) == 1
    expected = generate(model, 1, max_new_tokens=600, use_cuda_graph=False)
    assert_same_bits(generate(model, 1, max_new_tokens=600), expected)
    assert model.decode_graphs._cache is not cache
    assert len(recorder.graphs) == 2
    generate(model, 1, max_new_tokens=10)
    assert len(recorder.graphs) == 2


def test_changed_weights_are_seen_and_replaced_ones_captured_again(model, recorder):
    before = generate(model, 2)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    expected = generate(model, 2, use_cuda_graph=False)
    assert_same_bits(generate(model, 2), expected)
    assert len(recorder.graphs) == 1
    assert not torch.equal(before.sequences, expected.sequences)
    model.model.layers[1].mlp.dense_h_to_4h.weight = torch.nn.Parameter(
        model.model.layers[1].mlp.dense_h_to_4h.weight.detach() * -1
    )
    replaced = generate(model, 2, use_cuda_graph=False)
    assert_same_bits(generate(model, 2), replaced)
    assert len(recorder.graphs) == 2
    assert not torch.equal(replaced.sequences, expected.sequences)


def test_free_gives_everything_back(model, recorder):
    first = generate(model, 2)
    graphs = model.decode_graphs
    assert (len(graphs._steps), len(graphs._graphs)) == (1, 1)
    cache = weakref.ref(graphs._cache)
    graphs.free()
    assert (len(graphs._steps), len(graphs._graphs)) == (0, 0)
    del recorder.graphs[:]  # the recording holds the tensors too
    gc.collect()
    assert cache() is None
    assert_same_bits(generate(model, 2), first)
    assert len(recorder.graphs) == 1


def test_the_oldest_graphs_make_room(model, recorder, monkeypatch):
    monkeypatch.setattr(decode_graph, "MAX_GRAPHS", 2)
    for batch_size in (3, 2, 1, 1, 3):  # the largest first: a pool that grows drops the graphs
        assert_same_bits(generate(model, batch_size), generate(model, batch_size, use_cuda_graph=False))
        assert len(model.decode_graphs._steps) == len(model.decode_graphs._graphs) <= 2
    assert len(recorder.graphs) == 4


def test_copies_of_the_model_capture_their_own(model, recorder):
    expected = generate(model, 1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.decode_graphs._cache is None
        assert_same_bits(generate(other, 1), expected)


# ---- one step ahead ----


def test_the_host_is_one_step_ahead_and_no_more(model, recorder, monkeypatch):
    events = []
    launch, results = decode_graph.StepRunner.launch, DecodeStep.results

    def recorded_results(step):
        number, wait = len(events), results(step)
        return lambda: (events.append("read"), wait())[1] if number >= 0 else None

    monkeypatch.setattr(decode_graph.StepRunner, "launch", lambda *a: (events.append("launch"), launch(*a))[1])
    monkeypatch.setattr(DecodeStep, "results", recorded_results)
    generate(model, 2, max_new_tokens=4)
    # of four tokens the first comes with the prompt
    assert events == ["launch", "read", "launch", "read", "launch", "read", "read"]
    events.clear()
    generate(model, 2, max_new_tokens=4, use_cuda_graph=False)  # a CPU that does not capture
    assert events == ["read", "launch", "read", "launch", "read", "launch", "read"]


def test_running_ahead_op_by_op(model, monkeypatch):
    """As on a GPU where a capture failed: rows leave at once, while a step with them is on its way."""
    expected = generate(model, 8, eos_token_id=STOP_IDS)
    init = decode_graph.StepRunner.__init__

    def init_ahead(self, *arguments):
        init(self, *arguments)
        self.num_ahead = 1

    monkeypatch.setattr(decode_graph.StepRunner, "__init__", init_ahead)
    assert_same_bits(generate(model, 8, eos_token_id=STOP_IDS), expected)


def test_nothing_is_written_to_pages_of_others(model, recorder):
    generate(model, 8, max_new_tokens=100)  # for a pool that is larger than what the next call needs
    cache = model.decode_graphs._cache
    with torch.inference_mode():
        for pool in (*cache.k, *cache.v):
            pool.fill_(float("nan"))
    out = generate(model, 5, max_new_tokens=30, eos_token_id=STOP_IDS)
    assert len(set(out.num_new_tokens)) > 2
    prompt_lengths = prompts(5)["attention_mask"].sum(1).tolist()
    written = {page for pages in cache._pages for page in pages}
    assert len(cache.seqlens) < 5  # rows have left
    needed = sum(-(-(n + 30) // 64) for n in prompt_lengths)
    for pool in (*cache.k, *cache.v):
        touched = {page for page in range(cache.num_pages) if not pool[page].isnan().all()}
        assert len(touched) <= needed
        for page in written & touched:
            row = next(row for row, pages in enumerate(cache._pages) if page in pages)
            start = 64 * cache._pages[row].index(page)
            assert pool[page, :, max(0, cache.seqlens[row] - start) :].isnan().all()  # nor beyond a sequence's end
    assert not out.logprobs.isnan().any()


# ---- op by op after all ----


def test_a_capture_that_fails_is_reported_once_and_leaves_nothing(model):
    expected = generate(model, 2)
    num_tried = []

    def capture(run):
        num_tried.append(1)
        RecordedGraph(lambda: (run(), torch.tensor(3.0)))

    model.decode_graphs = DecodeGraphs(lambda device: capture)
    message = "op by op, not as one CUDA graph: the capture failed: RuntimeError: operation not permitted .*lift_fresh"
    with pytest.warns(UserWarning, match=message) as caught:
        assert_same_bits(generate(model, 2), expected)
    assert [warning.filename for warning in caught] == [__file__]
    assert_same_bits(generate(model, 3), generate(model, 3, use_cuda_graph=False))
    assert len(num_tried) == 1
    assert (model.decode_graphs._steps, model.decode_graphs._graphs, model.decode_graphs._cache) == ({}, {}, None)
    model.decode_graphs.free()  # asks for another try
    generate(model, 2)
    assert len(num_tried) == 2


def test_free_during_a_generation_is_refused(model, recorder):
    class Freeing:
        num_puts = 0

        def put(self, value):
            self.num_puts += 1
            if self.num_puts == 3:
                with pytest.raises(
                    RuntimeError, match=r"decode_graphs\.free: a generate call of this model is running"
                ):
                    model.decode_graphs.free()

        def end(self):
            pass

    generate(model, 1, streamer=Freeing())
    model.decode_graphs.free()


def test_a_rotary_table_that_changes_is_not_captured():
    model, recorder = make_model(**DYNAMIC), Recorder()
    model.decode_graphs = DecodeGraphs(recorder)
    with pytest.warns(UserWarning, match="the rotary table of rope type dynamic changes with the length") as caught:
        out = generate(model, 3)
    assert [warning.filename for warning in caught] == [__file__]
    assert_same_bits(out, generate(model, 3, use_cuda_graph=False))
    assert not recorder.graphs


def test_ops_without_kernels_are_not_captured(model, recorder, monkeypatch):
    monkeypatch.setattr("persimmon_fast.ops._FORCE_REFERENCE", True)
    with pytest.warns(UserWarning, match="some ops run the pure-torch reference"):
        generate(model, 1, max_new_tokens=4)
    assert not recorder.graphs


@pytest.mark.parametrize("path", ["embed_tokens", "layers.1", "layers.0.self_attn", "layers.0.mlp"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(model, recorder, path, register):
    generate(model, 1)
    calls = []
    hook = getattr(model.model.get_submodule(path), register)(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="a module has a forward hook"):
        generate(model, 1, max_new_tokens=5)
    assert len(calls) == 5
    hook.remove()
    generate(model, 1)
    assert len(recorder.graphs) == 1


def test_training_mode_is_not_captured(model, recorder):
    with pytest.warns(UserWarning, match=r"the model is in training mode: call eval\(\)"):
        generate(model.train(), 1)
    assert not recorder.graphs


def test_a_second_call_at_the_same_time_has_its_own_cache(model, recorder):
    expected = generate(model, 1, use_cuda_graph=False)

    class SecondCall:
        """Generates with the model from another thread, in the middle of a generation."""

        num_puts, out = 0, None

        def put(self, value):
            self.num_puts += 1
            if self.num_puts == 3:  # the second token
                thread = threading.Thread(target=self.run)
                thread.start()
                thread.join()

        def run(self):
            with pytest.warns(UserWarning, match="another generate call of this model is running"):
                self.out = generate(model, 1)

        def end(self):
            pass

    second = SecondCall()
    assert_same_bits(generate(model, 1, streamer=second), expected)
    assert_same_bits(second.out, expected)
    generate(model, 1)  # and the lock is free again


def test_an_error_in_the_middle_leaves_the_graphs_usable(model, recorder):
    class Failing:
        num_left = 5

        def put(self, value):
            self.num_left -= 1
            if not self.num_left:
                raise KeyboardInterrupt

        def end(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        generate(model, 1, streamer=Failing())
    assert_same_bits(generate(model, 1), generate(model, 1, use_cuda_graph=False))
    assert len(recorder.graphs) == 1


def test_prompt_lookup_is_not_captured(model, recorder):
    generate(model, 1, prompt_lookup_num_tokens=3)
    assert not recorder.graphs
