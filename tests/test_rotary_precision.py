"""rope_precision: the rotary numerics of Adept's server, bit for bit. docs/rotary_precision.md

The expected values are evaluated here in plain torch from the description of the server's steps. Where it needs q, k
and v before rotary, inputs are chosen so that products and statistics are exact in any order of summation.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from helpers import EMU, FLOOR, backend, max_error, tiny_config
from recorded_graph import RecordedGraph
from torch import Tensor

from persimmon_fast import PersimmonConfig, PersimmonForCausalLM, ops, rounded_qkv
from persimmon_fast.config import ConfigError
from persimmon_fast.decode_graph import DecodeGraphs
from persimmon_fast.rope import rope_cos_sin, rope_inv_freq

DTYPE = {"adept_bf16": torch.bfloat16, "adept_fp16": torch.float16}
NUM_POSITIONS = 16384
HEADS, HEAD_DIM = 2, 64
BIG = PersimmonConfig()  # theta 25000, rotary_dim 32 of head_dim 64, 16,384 positions

both_modes = pytest.mark.parametrize("mode", DTYPE)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def table(mode: str) -> Tensor:
    return rope_cos_sin(BIG.replace(rope_precision=mode), NUM_POSITIONS)


def angles(dtype: torch.dtype) -> Tensor:
    """[16384, 16] in dtype: positions, inverse frequencies and their products rounded to it."""
    inv_freq = 1.0 / (25000.0 ** (torch.arange(0, 32, 2).float() / 32))
    return torch.outer(torch.arange(NUM_POSITIONS).to(dtype), inv_freq.to(dtype))


def literal_cos_sin(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In bf16 any fp32 cosine leads to these bits; in fp16 the correctly rounded one is taken (see the doubt below)."""
    freqs = angles(dtype)
    wide = freqs.float() if dtype == torch.bfloat16 else freqs.double()
    return wide.cos().float().to(dtype), wide.sin().float().to(dtype)


def literal_rotation(x: Tensor, positions: Tensor) -> Tensor:
    """x [num_tokens, heads, 64] in the model's dtype, rotated by a table in that dtype: two exact products in fp32,
    their sum, one rounding."""
    cos, sin = (t[positions].unsqueeze(1).float() for t in literal_cos_sin(x.dtype))
    x1, x2 = x[..., :16].float(), x[..., 16:32].float()
    return torch.cat([(x1 * cos - x2 * sin).to(x.dtype), (x1 * sin + x2 * cos).to(x.dtype), x[..., 32:]], -1)


def rounding_every_product(x: Tensor, positions: Tensor) -> Tensor:
    """The same in eager torch as Adept's own module computes it, which its server's command line does not use."""
    cos, sin = (torch.cat([t, t], -1)[positions].unsqueeze(1) for t in literal_cos_sin(x.dtype))
    turned, rest = x[..., :32], x[..., 32:]
    half = torch.cat([-turned[..., 16:], turned[..., :16]], -1)
    return torch.cat([turned * cos + half * sin, rest], -1)


# ---- the table ----


def test_bf16_holds_1025_of_16384_positions():
    positions = torch.arange(NUM_POSITIONS).to(torch.bfloat16)
    assert positions.unique().numel() == 1025
    rows = table("adept_bf16")
    assert rows.unique(dim=0).shape[0] == 1025
    assert torch.equal(rows[4113], rows[4128])  # bf16 counts in steps of 32 there
    assert torch.equal(rows[4112], rows[4096])


def test_fp16_holds_5121_of_16384_positions():
    assert torch.arange(NUM_POSITIONS).to(torch.float16).unique().numel() == 5121
    assert table("adept_fp16").unique(dim=0).shape[0] == 5121


@both_modes
def test_table_is_that_of_the_server(mode):
    cos, sin = literal_cos_sin(DTYPE[mode])
    assert torch.equal(table(mode), torch.cat([cos, sin], -1).float())


@both_modes
def test_row_0_rotates_by_nothing(mode):
    """`rounded_qkv` takes it for the steps before rotary."""
    row = table(mode)[0]
    assert torch.equal(row, torch.cat([torch.ones(16), torch.zeros(16)]))


def in_doubt(exact: Tensor, dtype: torch.dtype, num_ulp: int) -> Tensor:
    """Where an fp32 number within num_ulp of exact (fp64) may round to another number of dtype."""
    near = exact.float()
    ulp = (torch.nextafter(near.abs(), torch.tensor(torch.inf)) - near.abs()).double() * num_ulp
    return (exact - ulp).float().to(dtype) != (exact + ulp).float().to(dtype)


@pytest.mark.parametrize(("mode", "num_angles", "num_in_doubt"), [("adept_bf16", 2859, 0), ("adept_fp16", 19811, 20)])
def test_bits_that_depend_on_who_computes_the_cosine(mode, num_angles, num_in_doubt):
    """2 ulp: the error bound of CUDA's cosf and sinf. In bf16 every machine makes the same table."""
    dtype = DTYPE[mode]
    different = angles(dtype).unique().double()
    assert len(different) == num_angles
    assert sum(int(in_doubt(f(different), dtype, 2).sum()) for f in (torch.cos, torch.sin)) == num_in_doubt


@both_modes
def test_inverse_frequencies_do_not_depend_on_who_computes_them(mode):
    exact = 25000.0 ** (-torch.arange(0, 32, 2).double() / 32)
    assert not in_doubt(exact, DTYPE[mode], 64).any()
    assert torch.equal(exact.float().to(DTYPE[mode]), rope_inv_freq(BIG)[0].to(DTYPE[mode]))


# ---- q and k ----


def exact_projection(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, bias) whose projection is one product and one sum each: a row of weight picks an element."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.cat([torch.randperm(HEAD_DIM, generator=generator) for _ in range(3 * HEADS)])
    head = torch.arange(HEADS).repeat_interleave(3 * HEAD_DIM)
    weight = torch.zeros(3 * HEADS * HEAD_DIM, HEADS * HEAD_DIM, dtype=dtype)
    weight[torch.arange(len(picks)), head * HEAD_DIM + picks] = 1
    x = torch.randn(NUM_POSITIONS, HEADS * HEAD_DIM, generator=generator).to(dtype)
    return x, weight, torch.randn(len(weight), generator=generator).to(dtype)


@both_modes
def test_q_and_k_are_the_servers_at_every_position(mode):
    dtype, positions = DTYPE[mode], torch.arange(NUM_POSITIONS)
    x, weight, bias = exact_projection(dtype, seed=1)
    projected = (x.float() @ weight.float().T + bias.float()).to(dtype).view(-1, HEADS, 3, HEAD_DIM)
    q, k, v = rounded_qkv.qkv_norm_rope(x, weight, bias, *[None] * 4, table(mode), positions, 1e-5, HEADS)
    assert torch.equal(q, literal_rotation(projected[:, :, 0], positions))
    assert torch.equal(k, literal_rotation(projected[:, :, 1], positions))
    assert torch.equal(v, projected[:, :, 2])
    assert not torch.equal(q, rounding_every_product(projected[:, :, 0], positions))


@both_modes
@pytest.mark.parametrize("per_head", [False, True])
def test_layer_norm_is_rounded_before_the_rotation(mode, per_head):
    """Heads of as many 1 as -1: mean 0, variance 1, so that the LayerNorm is one product and one sum per element."""
    dtype, positions = DTYPE[mode], torch.arange(NUM_POSITIONS)
    x, weight, _ = exact_projection(dtype, seed=2)
    x = torch.ones_like(x).view(-1, HEADS, HEAD_DIM)
    generator = torch.Generator().manual_seed(3)
    minus = torch.rand(x.shape, generator=generator).argsort(-1) < HEAD_DIM // 2
    x = x.masked_fill(minus, -1).flatten(1)
    shape = (HEADS, HEAD_DIM) if per_head else (HEAD_DIM,)
    norms = [(torch.randn(shape, generator=generator) + (i % 2 == 0)).to(dtype) for i in range(4)]
    projected = (x.float() @ weight.float().T).view(-1, HEADS, 3, HEAD_DIM)
    q, k, v = rounded_qkv.qkv_norm_rope(x, weight, None, *norms, table(mode), positions, 1e-5, HEADS)
    scale = (1 + 1e-5) ** -0.5
    fused = ops.qkv_norm_rope(x, weight, None, *norms, table(mode), positions, 1e-5, HEADS)
    assert not torch.equal(q, fused[0])  # which rounds once after LayerNorm and rotation
    for actual, signs, w, b in ((q, projected[:, :, 0], *norms[:2]), (k, projected[:, :, 1], *norms[2:])):
        normed = (signs.double() * scale * w.double() + b.double()).to(dtype)
        assert torch.equal(actual, literal_rotation(normed, positions))
    assert torch.equal(v, projected[:, :, 2].to(dtype))


@pytest.mark.parametrize("name", ["cpu", EMU])
@both_modes
def test_paged_writes_the_same_k_and_v(mode, name):
    """Also with the CUDA kernels, on few tokens."""
    dtype, positions = DTYPE[mode], torch.tensor([0, 1, 4113, 16383, 777])
    x, weight, bias = exact_projection(dtype, seed=4)
    x = x[:5]
    projected = (x.float() @ weight.float().T + bias.float()).to(dtype).view(-1, HEADS, 3, HEAD_DIM)
    caches = [torch.full((3, HEADS, 4, HEAD_DIM), 7.0, dtype=dtype) for _ in range(2)]
    slots = torch.tensor([5, 0, 11, 6, 7])
    arguments = (x, weight, bias, *[None] * 4, table(mode), positions, 1e-5, HEADS, slots, *caches)
    if name == "cpu":
        q = rounded_qkv.qkv_norm_rope_paged(*arguments)
    else:
        with backend(name):
            q = rounded_qkv.qkv_norm_rope_paged(*arguments)
    k_cache, v_cache = (cache.transpose(1, 2).flatten(0, 1) for cache in caches)
    assert torch.equal(q, literal_rotation(projected[:, :, 0], positions))
    assert torch.equal(k_cache[slots], literal_rotation(projected[:, :, 1], positions))
    assert torch.equal(v_cache[slots], projected[:, :, 2])
    untouched = torch.ones(12, dtype=torch.bool).index_fill(0, slots, False)
    assert torch.all(k_cache[untouched] == 7)
    assert torch.all(v_cache[untouched] == 7)


# ---- the model ----


def make_model(mode: str = "adept_bf16", dtype: torch.dtype | None = None, **changes: object) -> PersimmonForCausalLM:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PersimmonForCausalLM(tiny_config(rope_precision=mode, **changes)).eval()
    for name, parameter in model.named_parameters():
        noise = 0.3 * torch.randn_like(parameter)
        parameter.copy_(1 + noise if "layernorm.weight" in name else noise)
    return model.to(dtype or DTYPE[mode])


IDS = torch.randint(160, (2, 70), generator=torch.Generator().manual_seed(1))


@both_modes
def test_prefill_equals_decode_steps(mode):
    model = make_model(mode)
    whole, cache, steps = model(IDS, use_cache=True), None, []
    for i in range(IDS.shape[1]):
        out = model(IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    bound = 4 * FLOOR[DTYPE[mode]] * float(whole.logits.abs().max())
    assert max_error(torch.cat(steps, 1), whole.logits) <= bound
    assert max_error(model(IDS, use_cache=False).logits, whole.logits) <= bound


@both_modes
@pytest.mark.parametrize("use_cache", [False, True])
def test_every_layer_rounds(mode, use_cache, monkeypatch):
    model, calls, original = make_model(mode), [], rounded_qkv.qkv_norm_rope
    monkeypatch.setattr(rounded_qkv, "qkv_norm_rope", lambda *args, **norm: calls.append(1) or original(*args, **norm))
    model(IDS, use_cache=use_cache)
    assert len(calls) == 2


@both_modes
def test_fp32_is_another_model_of_almost_the_same_logits(mode):
    ours, exact = make_model(mode), make_model("fp32", DTYPE[mode])
    ours.load_state_dict(exact.state_dict())
    near, far = ours(IDS).logits, exact(IDS).logits
    assert not torch.equal(near, far)
    assert max_error(near, far) < 0.1 * float(far.abs().max())


def test_generate_replays_a_captured_step():
    captured = []

    def capture(run):
        captured.append(RecordedGraph(run))
        return captured[-1]

    model = make_model()
    expected = model.generate(IDS[:, :9], max_new_tokens=12, eos_token_id=None)
    model.decode_graphs = DecodeGraphs(lambda device: capture)
    assert torch.equal(model.generate(IDS[:, :9], max_new_tokens=12, eos_token_id=None), expected)
    assert captured[0].num_replays > 5


def test_construction_warns_once_that_it_is_slower():
    with pytest.warns(UserWarning, match="'adept_bf16' repeats the rounding .* slower than 'fp32'") as caught:
        model = PersimmonForCausalLM(tiny_config(rope_precision="adept_bf16", num_hidden_layers=3)).eval()
    model.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("mode", "dtype", "needed"),
    [
        ("adept_bf16", torch.float16, torch.bfloat16),
        ("adept_fp16", torch.bfloat16, torch.float16),
        ("adept_bf16", torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_a_model_of_another_dtype_is_refused(mode, dtype, needed):
    model = make_model(mode, dtype)
    message = f"rope_precision '{mode}' is for a model in {needed}, this one is in {dtype}: load it with dtype={needed}"
    with pytest.raises(ValueError, match=message):
        model(IDS)
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, max_new_tokens=2)


# ---- the config ----


def test_config_file_names_it_only_where_it_is_not_fp32(tmp_path):
    assert "rope_precision" not in tiny_config().to_dict()
    config = tiny_config(rope_precision="adept_fp16")
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_precision"] == "adept_fp16"
    assert PersimmonConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_precision": "bf16"}, "rope_precision: expected one of fp32, adept_fp16, adept_bf16, found 'bf16'"),
        ({"rope_precision": None}, "rope_precision: expected one of"),
        (
            {"rope_precision": "adept_bf16", "rope_scaling": {"rope_type": "linear", "factor": 2}},
            "rope_precision: expected fp32 with rope type linear, which Adept's code lacks",
        ),
        (
            {"rope_precision": "adept_fp16", "max_position_embeddings": 65505},
            "max_position_embeddings: expected at most 65504 with rope_precision adept_fp16",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values()))[:30],
)
def test_config_errors(change, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**change)
