"""Tensor parallel ranks merged into one model, and one model split over them: lazily, moving bytes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from persimmon_fast.adept import names
from persimmon_fast.adept.arguments import inverse_frequencies, read_config
from persimmon_fast.adept.pickles import FileTensor, RankFile
from persimmon_fast.adept.rows import Cut, FileRows, LazyTensor, Rows, SideBySide, Stacked, TensorRows, equal
from persimmon_fast.checkpoint_files import CheckpointMismatchError, shown
from persimmon_fast.checkpoint_tensors import EMBEDDING, HEAD, expected_tensors
from persimmon_fast.config import PersimmonConfig
from persimmon_fast.config_file import ConfigError


def merged(ranks: Sequence[RankFile]) -> tuple[PersimmonConfig, dict[str, LazyTensor]]:
    """The config (without token ids) and our tensors, by name, of a checkpoint.

    A LayerNorm of queries and keys may be one for all heads, one a rank (the same for its heads) or one a head. Where
    all heads have the same everywhere it is the ordinary one; else the config says that each head has its own.

    Raises:
        CheckpointMismatchError: names, shapes, dtypes or arguments contradict each other or are no Persimmon's.
    """
    per_rank = [_renamed(rank) for rank in ranks]
    config = read_config(ranks[0].member.name, ranks[0].arguments, per_rank[0], len(ranks))
    if config.num_attention_heads % len(ranks):
        expected, found = f"a multiple of the {len(ranks)} ranks", str(config.num_attention_heads)
        raise CheckpointMismatchError(ranks[0].member.name, "args.num_attention_heads", expected, found)
    _check_same_arguments(ranks)
    _check_inv_freq(ranks, config)
    norms = _qk_norms(ranks, per_rank, config) if config.qk_layernorm else {}
    if any(len(tensor.shape) == 2 for tensor in norms.values()):
        config = config.replace(qk_layernorm_per_head=True)
    result = {}
    for name, shape in expected_tensors(config).items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        result[name] = norms[name] if name in norms else _merged_tensor(ranks, per_rank, name, shape)
    _check_names(ranks, per_rank, config, set(result))
    dtypes = {tensor.dtype for tensor in result.values()}
    return config.replace(dtype=dtypes.pop() if len(dtypes) == 1 else result[EMBEDDING].dtype), result


def _renamed(rank: RankFile) -> dict[str, FileTensor]:
    """Tensors by today's names, the rotary buffers left out."""
    result: dict[str, FileTensor] = {}
    for name, tensor in rank.tensors.items():
        name = names.current_name(name)
        if name in result:
            raise CheckpointMismatchError(rank.member.name, name, "each tensor once", "two of that name")
        if not names.is_inv_freq(name):
            result[name] = tensor
    return result


def _check_same_arguments(ranks: Sequence[RankFile]) -> None:
    """Ranks of different runs or iterations in one folder would merge without a sound."""
    first = ranks[0]
    keys = ("num_layers", "hidden_size", "num_attention_heads", "rotary_emb_base", "rotary_pct", "layernorm_epsilon")
    for rank in ranks[1:]:
        facts = {key: (first.arguments.get(key), rank.arguments.get(key)) for key in keys}
        facts["iteration"] = (first.iteration, rank.iteration)
        for key, (expected, found) in facts.items():
            if expected != found:
                where = f"{expected!r}, as in {first.member.name}"
                raise CheckpointMismatchError(rank.member.name, key, where, shown(repr(found)), "These ranks differ.")


def _check_inv_freq(ranks: Sequence[RankFile], config: PersimmonConfig) -> None:
    """The rotary buffer is dropped, but tells whether the arguments name the angles of the training. bf16 rounds it by
    up to 0.4 %; a base of 10000 instead of 25000 differs by 6 % and more."""
    expected = inverse_frequencies(config.rope_theta, config.rotary_dim)
    for rank in ranks:
        for name, tensor in rank.tensors.items():
            if not names.is_inv_freq(names.current_name(name)):
                continue
            rows = FileRows(tensor)
            found = torch.from_numpy(rows.read(0, rows.num_rows).copy()).view(tensor.dtype).flatten().float()
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.01, atol=0):
                stated = f"that of rotary_emb_base {config.rope_theta:g} for {config.rotary_dim} rotated elements"
                shown_values = f"{len(found)} values, the second {found[1].item() if len(found) > 1 else None}"
                raise CheckpointMismatchError(rank.member.name, name, stated, shown_values)


def _merged_tensor(
    ranks: Sequence[RankFile], per_rank: Sequence[Mapping[str, FileTensor]], name: str, shape: tuple[int, ...]
) -> LazyTensor:
    dim, adept = names.split_dim(name), names.to_adept(name)
    part_shape = list(shape)
    if dim is not None:
        part_shape[dim] //= len(ranks)
    first = per_rank[0].get(adept)
    parts = [_part(rank, held, adept, tuple(part_shape), first) for rank, held in zip(ranks, per_rank, strict=True)]
    assert first is not None  # else _part has refused
    if dim is not None:
        return LazyTensor(first.dtype, shape, parts[0] if len(parts) == 1 else (Stacked, SideBySide)[dim](parts))
    for rank, part in zip(ranks[1:], parts[1:], strict=True):
        if not equal(parts[0], part):
            hint = "Every rank must hold the same; no single model computes what these do together."
            raise CheckpointMismatchError(
                rank.member.name, adept, f"the values of {ranks[0].member.name}", "other values", hint
            )
    return LazyTensor(first.dtype, shape, parts[0])


def _part(
    rank: RankFile, tensors: Mapping[str, FileTensor], adept: str, shape: tuple[int, ...], first: FileTensor | None
) -> FileRows:
    """One rank's part of what rank 0 has as `first`, checked."""
    tensor = tensors.get(adept)
    if tensor is None or first is None:
        raise CheckpointMismatchError(rank.member.name, adept, f"a tensor of shape {list(shape)}", "none of that name")
    if tensor.shape != shape:
        raise CheckpointMismatchError(rank.member.name, adept, f"shape {list(shape)}", str(list(tensor.shape)))
    if tensor.dtype != first.dtype:
        raise CheckpointMismatchError(rank.member.name, adept, f"{first.dtype}, as rank 0 has", str(tensor.dtype))
    return FileRows(tensor)


def _check_names(
    ranks: Sequence[RankFile], per_rank: Sequence[Mapping[str, FileTensor]], config: PersimmonConfig, ours: set[str]
) -> None:
    """No tensor may be left over: what is not converted would be lost."""
    heads = config.num_attention_heads // len(ranks)
    whole = {names.to_adept(name) for name in ours}
    norms = [names.to_adept(name) for name in ours if names.is_qk_norm(name)]
    for rank, tensors in zip(ranks, per_rank, strict=True):
        own = {names.per_head(name, head) for name in norms if name not in tensors for head in range(heads)}
        unknown = [name for name in tensors if name not in whole | own]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise CheckpointMismatchError(
                rank.member.name,
                unknown[0],
                f"the tensors of a Persimmon with {config.num_hidden_layers} layers",
                f"it{more}",
            )


# ---- the LayerNorms of queries and keys ----


def _qk_norms(
    ranks: Sequence[RankFile], per_rank: Sequence[Mapping[str, FileTensor]], config: PersimmonConfig
) -> dict[str, LazyTensor]:
    """By our names: [head_dim] each if all heads agree everywhere, else [num_heads, head_dim] each. A few kilobytes."""
    heads = config.num_attention_heads // len(ranks)
    values: dict[str, tuple[torch.dtype, np.ndarray]] = {}
    for name in (name for name in expected_tensors(config) if names.is_qk_norm(name)):
        adept, rows = names.to_adept(name), []
        own = [names.per_head(adept, head) for head in range(heads)]
        first = per_rank[0].get(adept, per_rank[0].get(own[0]))
        for rank, held in zip(ranks, per_rank, strict=True):
            keys = [adept] * heads if adept in held or own[0] not in held else own
            rows += [_part(rank, held, key, (config.head_dim,), first) for key in keys]
        assert first is not None  # else _part has refused
        values[name] = (first.dtype, np.stack([part.read(0, part.num_rows).reshape(-1) for part in rows]))
    shared = all((rows == rows[0]).all() for _, rows in values.values())
    result = {}
    for name, (dtype, data) in values.items():
        tensor = torch.from_numpy(data[:1] if shared else data).view(dtype)
        tensor = tensor.reshape(-1) if shared else tensor
        result[name] = LazyTensor(dtype, tuple(tensor.shape), TensorRows(tensor))
    return result


# ---- the way back ----


def split(config: PersimmonConfig, tensors: Mapping[str, LazyTensor], num_ranks: int) -> list[dict[str, LazyTensor]]:
    """Adept's tensors of each rank, by Adept's names, the rotary buffers included.

    Raises:
        ConfigError: heads, neurons or vocabulary cannot be shared by so many ranks.
    """
    for key in ("num_attention_heads", "intermediate_size", "vocab_size"):
        if getattr(config, key) % num_ranks:
            raise ConfigError(key, f"a multiple of the {num_ranks} ranks", str(getattr(config, key)))
    result: list[dict[str, LazyTensor]] = []
    for rank in range(num_ranks):
        parts: dict[str, LazyTensor] = {}
        for name, tensor in tensors.items():
            adept, dim = names.to_adept(name), names.split_dim(name)
            if names.is_qk_norm(name) and len(tensor.shape) == 2:
                parts |= _heads(config, adept, tensor, rank, num_ranks)
            elif dim is None or num_ranks == 1:
                parts[adept] = tensor
            else:
                shape = tuple(size // num_ranks if d == dim else size for d, size in enumerate(tensor.shape))
                parts[adept] = LazyTensor(tensor.dtype, shape, Cut(tensor.rows, dim, rank, num_ranks))
        result.append(parts | _rotary_buffers(config, tensors[EMBEDDING].dtype))
    return result


def _heads(config: PersimmonConfig, adept: str, tensor: LazyTensor, rank: int, num_ranks: int) -> dict[str, LazyTensor]:
    """[num_heads, head_dim] as one tensor for each head of the rank."""
    heads, head_dim = config.num_attention_heads // num_ranks, config.head_dim
    result = {}
    for head in range(heads):
        data = tensor.rows.read(rank * heads + head, rank * heads + head + 1)
        row: Rows = TensorRows(torch.from_numpy(data.copy()).view(tensor.dtype).reshape(-1))
        result[names.per_head(adept, head)] = LazyTensor(tensor.dtype, (head_dim,), row)
    return result


def _rotary_buffers(config: PersimmonConfig, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Adept's code casts the whole module, this buffer with it, to the dtype of the model."""
    buffer = inverse_frequencies(config.rope_theta, config.rotary_dim).to(dtype)
    tensor = LazyTensor(dtype, tuple(buffer.shape), TensorRows(buffer))
    return {
        f"language_model.encoder.layers.{layer}.self_attention.rotary_emb.inv_freq": tensor
        for layer in range(config.num_hidden_layers)
    }
