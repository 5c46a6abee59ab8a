"""What `run.py prefill` times: products with their epilogues, attention, a decoder layer, each beside its rivals.

Weights are those of a model's layers, one layer after the other: with 36 of them a weight has left every cache before
its turn comes again. What ours and torch get differs in the down-projection's memory order alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import counts, plain
from benchmarks.cases import Call, Workspace
from benchmarks.timing import Variant
from benchmarks.transformers_modes import row_major_weights
from persimmon_fast import PersimmonForCausalLM, ops, reference
from persimmon_fast.kv_cache import PAGE_SIZE, PackedBatch, PagedKVCache, pages_of
from persimmon_fast.rope import rope_cos_sin

OURS, BARE, EAGER, COMPILED = "ours", "torch.mm", "torch", "torch.compile"
# math writes all scores to memory: 34 GB at 16,384 tokens, and slower than the others wherever they run
SDPA_BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
_QKV, _DENSE, _UP, _DOWN = (
    "self_attn.query_key_value",
    "self_attn.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
_HEAD_NORMS = tuple(f"self_attn.{which}_layernorm.{what}" for which in "qk" for what in ("weight", "bias"))

Weights = dict[str, Tensor]  # of one layer, by name


@dataclass(frozen=True)
class Program:
    """One of the programs that are timed together.

    Args:
        run: one call of it.
        result: what of the output must agree with `Contest.expected`; None: it leaves out work, as a bare product.
        is_last_resort: whether it runs only where no other rival does.
    """

    run: Variant
    result: Callable[[Any], Tensor] | None = lambda out: out
    is_last_resort: bool = False


@dataclass(frozen=True)
class Contest:
    """Programs that are timed together.

    Args:
        part: gemm, attention or layer. tokens: rows.
        flops: of one call. products: matrices that it multiplies with; 0: not a matter of products.
        programs: ours first.
        expected: the result in fp32.
    """

    part: str
    label: str
    tokens: int
    flops: float
    programs: dict[str, Program]
    expected: Callable[[], Tensor]
    products: int = 0


@dataclass
class Setting:
    """The model whose layers all programs go through, and what they have in common."""

    model: PersimmonForCausalLM
    workspace: Workspace
    weights: dict[str, Tensor] = field(init=False)  # of the whole model, every matrix in torch's order
    layers: list[Weights] = field(init=False)
    torch_layers: list[Weights] = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.model.config
        self.weights = row_major_weights(self.model)
        self.layers, self.torch_layers = (self._by_layer(w) for w in (self.model.state_dict(), self.weights))

    @property
    def both_layers(self) -> tuple[list[Weights], list[Weights]]:
        """As ours takes the weights, and as torch does."""
        return self.layers, self.torch_layers

    def _by_layer(self, weights: dict[str, Tensor]) -> list[Weights]:
        layers = []
        for index in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            layers.append({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
        return layers

    def randn(self, *shape: int) -> Tensor:
        return self.workspace.randn(*shape)

    def cos_sin(self, tokens: int) -> Tensor:
        return rope_cos_sin(self.config, tokens, None, self.model.device)

    def plain_tail(self, tokens: int) -> tuple[Tensor, Tensor, float, int]:
        """cos and sin [tokens, 1, rotary_dim / 2] in the model's dtype, eps and num_heads, as `plain` takes them."""
        cos, sin = self.cos_sin(tokens).to(self.model.dtype).unsqueeze(1).chunk(2, dim=-1)
        return cos, sin, self.config.layer_norm_eps, self.config.num_attention_heads

    def positions(self, tokens: int) -> Tensor:
        return self.workspace.arange(tokens)


def _wide(arguments: Sequence[Any]) -> list[Any]:
    return [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def _with_bias(layer: Weights, *names: str) -> list[Tensor]:
    return [layer[f"{name}.{what}"] for name in names for what in ("weight", "bias")]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


# ---- products with their epilogues ----


@dataclass(frozen=True)
class Gemm:
    """One op that multiplies with weights.

    Args:
        name: product and epilogue.
        matrices: that it multiplies with; what bare torch.mm multiplies with, too.
        make: ours, torch's programs and what they must compute, for x [rows, hidden_size].
    """

    name: str
    matrices: tuple[str, ...]
    make: Callable[[Setting, Tensor], tuple[dict[str, Program], Callable[[], Tensor]]]


def _programs(
    ours: Program, function: Callable[..., Any], arguments: Sequence[Sequence[Any]], result: Any = lambda out: out
) -> dict[str, Program]:
    sets = [tuple(a) for a in arguments]
    return {
        OURS: ours,
        EAGER: Program(Call(function, sets), result),
        COMPILED: Program(Call(_compiled(function), sets), result),
    }


def _make_qkv(setting: Setting, x: Tensor) -> tuple[dict[str, Program], Callable[[], Tensor]]:
    config, rows = setting.config, x.shape[0]
    heads, dim, eps = config.num_attention_heads, config.head_dim, config.layer_norm_eps
    positions, cos_sin = setting.positions(rows), setting.cos_sin(rows)
    pages = [x.new_zeros(pages_of(rows), heads, PAGE_SIZE, dim) for _ in range(2)]
    cache = [x.new_zeros(heads, rows, dim) for _ in range(2)]
    names = [f"{_QKV}.weight", f"{_QKV}.bias", *_HEAD_NORMS]
    ours, projections = ([[x, *(layer[n] for n in names)] for layer in layers] for layers in setting.both_layers)
    slots = positions  # page by page
    tail = setting.plain_tail(rows)

    def with_pages(q: Tensor) -> Tensor:
        return torch.cat([q, *(pool.transpose(1, 2).flatten(0, 1)[:rows] for pool in pages)])

    def with_cache(q: Tensor) -> Tensor:
        out = torch.cat([q, *(pool.transpose(0, 1) for pool in cache)])
        for pool in cache:
            pool.zero_()  # the next program has to write its own
        return out

    programs = _programs(
        Program(
            Call(ops.qkv_norm_rope_paged, [(*p, cos_sin, positions, eps, heads, slots, *pages) for p in ours]),
            with_pages,
        ),
        plain.qkv_norm_rope_cached,
        [(*p, *tail, positions, *cache) for p in projections],
        with_cache,
    )
    return programs, lambda: torch.cat(plain.qkv_norm_rope(*_wide((*projections[0], *tail))))


def _make_dense(setting: Setting, x: Tensor) -> tuple[dict[str, Program], Callable[[], Tensor]]:
    residual = setting.randn(*x.shape)
    ours, arguments = (
        [(x, *_with_bias(layer, _DENSE), residual) for layer in layers] for layers in setting.both_layers
    )
    programs = _programs(Program(Call(ops.linear_residual, ours)), plain.linear_residual, arguments)
    return programs, lambda: plain.linear_residual(*_wide(arguments[0]))


def _make_mlp(setting: Setting, x: Tensor) -> tuple[dict[str, Program], Callable[[], Tensor]]:
    residual = setting.randn(*x.shape)
    ours, arguments = (
        [(x, *_with_bias(layer, _UP, _DOWN), residual) for layer in layers] for layers in setting.both_layers
    )
    programs = _programs(Program(Call(ops.squared_relu_mlp, ours)), plain.squared_relu_mlp, arguments)
    return programs, lambda: plain.squared_relu_mlp(*_wide(arguments[0]))


# Both products of the MLP are one op, so they are timed, and compared with two bare products, as one.
GEMMS = (
    Gemm("QKV + bias + qk-layernorm + rotary + cache write", (_QKV,), _make_qkv),
    Gemm("dense + bias + residual", (_DENSE,), _make_dense),
    Gemm("up + bias + relu^2, down + bias + residual", (_UP, _DOWN), _make_mlp),
)


def gemm_contest(setting: Setting, gemm: Gemm, rows: int) -> Contest:
    x = setting.randn(rows, setting.config.hidden_size)
    programs, expected = gemm.make(setting, x)
    matrices = [[layer[f"{name}.weight"].t() for name in gemm.matrices] for layer in setting.torch_layers]
    inputs = [x]
    if len(gemm.matrices) == 2:  # the MLP's second product: half of what it multiplies is zero, which saves power
        inputs.append(torch.mm(x, matrices[0][0]).relu_().square_())
    outs = [a.new_empty(rows, b.shape[1]) for a, b in zip(inputs, matrices[0], strict=True)]

    def bare(call: int) -> None:
        for a, b, out in zip(inputs, matrices[call % len(matrices)], outs, strict=True):
            torch.mm(a, b, out=out)

    return Contest(
        "gemm",
        f"{gemm.name}, {rows:,} rows",
        rows,
        sum(2.0 * rows * b.numel() for b in matrices[0]),
        {OURS: programs.pop(OURS), BARE: Program(bare, None), **programs},
        expected,
        products=len(gemm.matrices),
    )


# ---- attention ----


def sdpa(name: str | None) -> AbstractContextManager[None]:
    """torch's attention by one of SDPA_BACKENDS; None: torch chooses."""
    return nullcontext() if name is None else sdpa_kernel(SDPA_BACKENDS[name])


def attention_contest(setting: Setting, seqlen: int) -> Contest:
    """Causal, on normal numbers, as queries and keys are behind their LayerNorms."""
    heads, dim = setting.config.num_attention_heads, setting.config.head_dim
    q, k, v = (setting.randn(1, seqlen, heads, dim) for _ in range(3))

    def by(backend: str) -> Variant:
        def run(call: int) -> Tensor:
            with sdpa(backend):
                return plain.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True)

        return run

    def expected() -> Tensor:  # of the last head: the definition keeps all scores of a head several times
        last_q, last_k, last_v = (t[0, :, -1:].float() for t in (q, k, v))
        return reference.attention(last_q, last_k, last_v, dim**-0.5, True)[0][:, 0]

    # packed, as the model calls it: the batched form makes its cu_seqlens on the device in every call
    starts = torch.tensor([0, seqlen], dtype=torch.int32, device=q.device)
    bounds: dict[str, Any] = {"cu_seqlens_q": starts, "max_seqlen_q": seqlen}

    def ours(call: int) -> Tensor:
        return ops.flash_attention(q[0], k[0], v[0], **bounds, cu_seqlens_k=starts, max_seqlen_k=seqlen)[0]

    programs = {OURS: Program(ours, lambda out: out[:, -1])}
    pages = _in_pages(k), _in_pages(v)
    table = torch.arange(pages_of(seqlen), dtype=torch.int32, device=q.device).unsqueeze(0)
    programs["ours, paged"] = Program(
        lambda call: ops.paged_attention(q[0], *pages, table, starts[1:], **bounds), lambda out: out[:, -1]
    )
    for name in SDPA_BACKENDS:
        programs[name] = Program(by(name), lambda out: out[0, -1], is_last_resort=name == "SDPA math")
    return Contest(
        "attention",
        f"causal attention, {seqlen:,} tokens",
        seqlen,
        counts.flash_attention(1, seqlen, heads, dim, q.itemsize).flops,
        programs,
        expected,
    )


def _in_pages(x: Tensor) -> Tensor:
    """x [1, seqlen, num_heads, head_dim] as pages of a cache."""
    num_pages = pages_of(x.shape[1])
    padded = x.new_zeros(num_pages * PAGE_SIZE, *x.shape[2:])
    padded[: x.shape[1]] = x[0]
    return padded.unflatten(0, (num_pages, PAGE_SIZE)).transpose(1, 2).contiguous()


# ---- a decoder layer ----


def plain_layer_weights(layer: Weights) -> list[Tensor]:
    """As `plain.decoder_layer` takes them."""
    norms = ("input_layernorm", "post_attention_layernorm")
    return [
        *_with_bias(layer, norms[0], _QKV),
        *(layer[name] for name in _HEAD_NORMS),
        *_with_bias(layer, _DENSE, norms[1], _UP, _DOWN),
    ]


def layer_contest(setting: Setting, tokens: int, backend: str | None) -> Contest:
    """backend: of the rivals' attention, one of SDPA_BACKENDS; None: torch chooses."""
    config = setting.config
    x = setting.randn(tokens, config.hidden_size)
    cache = PagedKVCache(config, 1, tokens, dtype=x.dtype, device=x.device)
    batch = PackedBatch(
        position_ids=setting.positions(tokens),
        cos_sin=setting.cos_sin(tokens),
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32, device=x.device),
        max_seqlen_q=tokens,
        slots=cache.append([tokens]),
    )
    modules: Any = setting.model.model.layers
    blocks = [(module.bind(batch, (k, v)),) for module, k, v in zip(modules, cache.k, cache.v, strict=True)]
    tail = setting.plain_tail(tokens)
    arguments = [(x, *plain_layer_weights(layer), *tail) for layer in setting.torch_layers]

    def in_sdpa(call: Call) -> Variant:
        def run(index: int) -> Any:
            with sdpa(backend):
                return call(index)

        return run

    def hidden(out: tuple[Tensor, ...]) -> Tensor:
        return out[0]

    return Contest(
        "layer",
        f"decoder layer, {tokens:,} tokens, torch's with {backend or 'SDPA of its choice'}",
        tokens,
        counts.prompt_flops(tokens, 1, config.hidden_size, config.intermediate_size, vocab_size=0),
        {
            OURS: Program(Call(lambda block: block(x), blocks)),
            EAGER: Program(in_sdpa(Call(plain.decoder_layer, arguments)), hidden),
            COMPILED: Program(in_sdpa(Call(_compiled(plain.decoder_layer), arguments)), hidden),
        },
        lambda: plain.decoder_layer(*_wide(arguments[0]))[0],
    )
