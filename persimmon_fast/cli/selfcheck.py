"""A quick check of every compiled op against its definition in `reference`: small inputs, every dtype, any device.

The list of ops comes from the extension itself, so an op without a case here fails. The kernels are called directly:
PERSIMMON_FAST_FORCE_REFERENCE cannot make a check pass. The bound is that of the tests: twice the error of plain torch
(the reference in the tested dtype, on the CPU) against the reference in fp64, plus two roundings of the result's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persimmon_fast import _C, reference  # noqa: F401  importing _C registers the ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest magnitude expected
NAMESPACE = "persimmon_fast::"
_HEADS, _HEAD_DIM, _ROTARY_DIM, _PAGE = 2, 64, 32, 16
_HIDDEN, _INTERMEDIATE, _VOCAB, _EPS = _HEADS * _HEAD_DIM, 200, 333, 1e-5
_LENGTHS_Q, _LENGTHS_K = [3, 2], [21, 2]  # of two sequences: one longer than a page, one shorter


@dataclass(frozen=True)
class Check:
    """One op in one dtype on one device: error and bound of the worst output, or why it did not run."""

    op: str
    dtype: str
    device: str
    ok: bool
    error: float | None = None
    bound: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class _Case:
    """inputs(dtype): the op's arguments. expected(*arguments): outputs by the reference. actual(op, *arguments):
    outputs of the kernel, by default what it returns."""

    inputs: Callable[[torch.dtype], tuple[Any, ...]]
    expected: Callable[..., Any]
    actual: Callable[..., Any] = lambda op, *arguments: op(*arguments)


def registered_ops() -> list[str]:
    """Names of all ops of the extension, without namespace and overload."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.removeprefix(NAMESPACE).split(".")[0] for name in names if name.startswith(NAMESPACE)})


def run_checks(device: str) -> Iterator[Check]:
    """Checks every registered op, and every case, in every dtype on one device."""
    for op in sorted({*registered_ops(), *_CASES}):
        for dtype in DTYPES:
            yield check(op, dtype, device)


def check(op: str, dtype: torch.dtype, device: str) -> Check:
    """Checks one op in one dtype on "cpu" or "cuda:N"."""
    name = str(dtype).removeprefix("torch.")
    if op not in _CASES:
        return Check(op, name, device, ok=False, detail="no self-check covers this op")
    try:
        error, bound = compare(op, getattr(torch.ops.persimmon_fast, op), dtype, device)
    except NotImplementedError:
        backend = torch.device(device).type.upper()
        return Check(op, name, device, ok=False, detail=f"this build has no {backend} kernel for it")
    except Exception as failure:  # whatever is wrong with an op belongs in the table
        return Check(op, name, device, ok=False, detail=f"{type(failure).__name__}: {str(failure).splitlines()[0]}")
    ok = error <= bound  # False for NaN
    detail = "" if ok else f"error {error:.1e} exceeds {bound:.1e}"
    return Check(op, name, device, ok, error, bound, detail)


@torch.no_grad()
def compare(name: str, op: Callable[..., Any], dtype: torch.dtype, device: str) -> tuple[float, float]:
    """(error, bound) of the output of `op` that is worst in proportion to its bound, on the inputs of the op `name`."""
    case = _CASES[name]
    wide = [_widened(argument) for argument in case.inputs(dtype)]
    expected = _outputs(case.expected(*wide))
    plain = _outputs(case.expected(*case.inputs(dtype)))
    actual = [output.cpu() for output in _outputs(case.actual(op, *_moved(case.inputs(dtype), device)))]
    worst, worst_share = (0.0, 0.0), -1.0
    for got, near, exact in zip(actual, plain, expected, strict=True):
        if got.shape != exact.shape:
            raise ValueError(f"output of shape {list(got.shape)}, expected {list(exact.shape)}")
        if got.dtype != near.dtype:
            raise ValueError(f"output of dtype {got.dtype}, expected {near.dtype}")
        bound = 0.0
        if got.is_floating_point():
            bound = 2 * _distance(near, exact) + FLOOR[got.dtype] * float(exact.abs().max())
        error = _distance(got, exact)
        if not error <= bound:
            return error, bound
        share = error / bound if bound else 0.0
        if share > worst_share:
            worst, worst_share = (error, bound), share
    return worst


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _outputs(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _moved(arguments: tuple[Any, ...], device: str) -> list[Any]:
    """Arguments on a device; strides are kept."""
    return [argument.to(device) if isinstance(argument, Tensor) else argument for argument in arguments]


def _widened(argument: Any) -> Any:
    is_float = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if is_float else argument


# ---- inputs: the same numbers on every call ----


class _Numbers:
    """Normal numbers from a fixed seed, rounded to a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=self._generator) * scale + shift).to(self._dtype)


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _norms(numbers: _Numbers) -> tuple[Tensor, ...]:
    """q_weight, q_bias, k_weight, k_bias."""
    return tuple(numbers(_HEAD_DIM, scale=0.2, shift=shift) for shift in (1.0, 0.0, 1.0, 0.0))


def _rotary(num_tokens: int) -> tuple[Tensor, Tensor]:
    """cos_sin [32, rotary_dim] and position_ids [num_tokens]."""
    angles = torch.arange(32.0)[:, None] * 25000.0 ** (-torch.arange(0, _ROTARY_DIM, 2) / _ROTARY_DIM)
    return torch.cat([angles.cos(), angles.sin()], dim=1), torch.arange(num_tokens) * 7 % 32


def _layer_norm_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = _Numbers(dtype)
    return numbers(5, _HIDDEN, shift=3.0), numbers(_HIDDEN), numbers(_HIDDEN), _EPS


def _add_layer_norm_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = _Numbers(dtype)
    return numbers(5, _HIDDEN), numbers(5, _HIDDEN), numbers(_HIDDEN), numbers(_HIDDEN), _EPS


def _qk_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = _Numbers(dtype)
    q, k = numbers(5, _HEADS, _HEAD_DIM), numbers(5, _HEADS, _HEAD_DIM)
    return q, k, *_norms(numbers), *_rotary(5), _EPS


def _qkv_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = _Numbers(dtype)
    weight, bias = numbers(3 * _HIDDEN, _HIDDEN, scale=_HIDDEN**-0.5), numbers(3 * _HIDDEN)
    return numbers(5, _HIDDEN), weight, bias, *_norms(numbers), *_rotary(5), _EPS, _HEADS


def _qkv_paged_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    caches = [_Numbers(dtype)(3, _HEADS, _PAGE, _HEAD_DIM) for _ in "kv"]
    slots = torch.tensor([2 * _PAGE + 15, 0, -1, _PAGE + 3, 4])  # the third token is not kept
    return *_qkv_inputs(dtype), slots, *caches


def _qkv_paged_expected(*arguments: Any) -> tuple[Tensor, ...]:
    *projection, slots, k_cache, v_cache = arguments
    q, k, v = reference.qkv_norm_rope(*projection)
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    reference.write_paged(k, v, slots, k_cache, v_cache)
    return q, k_cache, v_cache


def _flash_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = _Numbers(dtype)
    q = numbers(sum(_LENGTHS_Q), _HEADS, _HEAD_DIM)
    k, v = (numbers(sum(_LENGTHS_K) + 4, _HEADS, _HEAD_DIM) for _ in "kv")
    starts_q, starts_k = _int32(0, 3, 5), _int32(0, 23, 27)  # 2 keys of padding behind each sequence
    return q, k, v, starts_q, starts_k, _int32(*_LENGTHS_K), 3, 23, _HEAD_DIM**-0.5, True


def _flash_expected(*arguments: Any) -> Any:
    q, k, v, starts_q, starts_k, used, _, _, scale, causal = arguments
    return reference.flash_attention(q, k, v, starts_q, starts_k, used, scale, causal)


def _paged_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = _Numbers(dtype)
    k_cache, v_cache = (numbers(4, _HEADS, _PAGE, _HEAD_DIM) for _ in "kv")
    for cache in (k_cache, v_cache):  # what lies behind a sequence's end must not be read
        cache[1, :, _LENGTHS_K[0] - _PAGE :] = math.nan
        cache[2, :, _LENGTHS_K[1] :] = math.nan
    table = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32)
    q = numbers(sum(_LENGTHS_Q), _HEADS, _HEAD_DIM)
    return q, k_cache, v_cache, table, _int32(*_LENGTHS_K), _int32(0, 3, 5), 3, _HEAD_DIM**-0.5


def _paged_expected(*arguments: Any) -> Any:
    q, k_cache, v_cache, table, lengths, starts_q, _, scale = arguments
    return reference.paged_attention(q, k_cache, v_cache, table, lengths, starts_q, scale)


def _linear_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = _Numbers(dtype)
    weight, bias = numbers(_INTERMEDIATE, _HIDDEN, scale=_HIDDEN**-0.5), numbers(_INTERMEDIATE)
    return numbers(5, _HIDDEN), weight, bias, numbers(5, _INTERMEDIATE)


def _mlp_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = _Numbers(dtype)
    up, up_bias = numbers(_INTERMEDIATE, _HIDDEN, scale=_HIDDEN**-0.5), numbers(_INTERMEDIATE, shift=-1.0)
    down = numbers(_INTERMEDIATE, _HIDDEN, scale=_INTERMEDIATE**-0.5).t()  # one row per neuron in memory
    return numbers(5, _HIDDEN), up, up_bias, down, numbers(_HIDDEN), numbers(5, _HIDDEN)


def _head_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    numbers = _Numbers(dtype)
    return numbers(4, _HIDDEN), numbers(_VOCAB, _HIDDEN, scale=0.2)


def _sample_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    """Greedy, top-k, top-p and min-p, one per row; two tokens are penalised."""
    settings = (
        torch.tensor([0.0, 0.8, 1.0, 1.5]),
        _int32(0, 5, 0, 0),
        torch.tensor([1.0, 1.0, 0.7, 1.0]),
        torch.tensor([0.0, 0.0, 0.0, 0.1]),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([0, 9, 5, 1 << 32]),
    )
    penalty_ids = torch.tensor([[7, -1], [3, 300], [0, 1], [-1, -1]])
    return *_head_inputs(dtype), *settings, penalty_ids, torch.tensor([1.0, 1.3, 0.8, 2.0])


def _logprobs_inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    return *_head_inputs(dtype), torch.tensor([0, 17, _VOCAB - 1, 100])


_CASES = {
    "layer_norm": _Case(_layer_norm_inputs, reference.layer_norm),
    "add_layer_norm": _Case(_add_layer_norm_inputs, reference.add_layer_norm),
    "qk_norm_rope": _Case(_qk_inputs, reference.qk_norm_rope),
    "qk_norm_rope_": _Case(_qk_inputs, reference.qk_norm_rope, lambda op, q, k, *rest: (op(q, k, *rest), q, k)[1:]),
    "qkv_norm_rope": _Case(_qkv_inputs, reference.qkv_norm_rope),
    "qkv_norm_rope_paged": _Case(
        _qkv_paged_inputs, _qkv_paged_expected, lambda op, *rest: (op(*rest), rest[-2], rest[-1])
    ),
    "flash_attention": _Case(_flash_inputs, _flash_expected),
    "paged_attention": _Case(_paged_inputs, _paged_expected),
    "linear_residual": _Case(_linear_inputs, reference.linear_residual),
    "squared_relu_mlp": _Case(_mlp_inputs, reference.squared_relu_mlp),
    "lm_head_argmax": _Case(_head_inputs, reference.lm_head_argmax),
    "lm_head_sample": _Case(_sample_inputs, reference.lm_head_sample),
    "lm_head_logprobs": _Case(_logprobs_inputs, reference.lm_head_logprobs),
}
