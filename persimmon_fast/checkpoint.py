"""Loading Persimmon weights in the Hugging Face layout.

Everything is checked from headers before a byte of weights is allocated: which tensors there are, their names, shapes
and dtypes, and whether files, shards and index agree. A tensor that already has the dtype asked for stays a view of a
private (copy-on-write) mapping of its file, so loading takes no time and no memory until a weight is used; others are
converted one by one. The one exception is `mlp.dense_4h_to_h.weight`: see `load_checkpoint`.

Checkpoint names of tensors appear here, in the decoder's module names, and nowhere else.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from persimmon_fast.checkpoint_files import (
    FLOAT_DTYPES,
    HARMLESS_EXTRAS,
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    NonFiniteWeightError,
    WeightFile,
    open_checkpoint,
    shown,
)
from persimmon_fast.checkpoint_save import save_checkpoint
from persimmon_fast.checkpoint_tensors import (
    CLASSIFIER_HEADS,
    DOWN_PROJECTION,
    EMBEDDING,
    HEAD,
    ModelConfig,
    expected_tensors,
    names_in_files,
    tensors_of_class,
    text_prefix,
)
from persimmon_fast.memory import to_neuron_major, use_huge_pages

__all__ = [
    "CheckpointError",
    "CheckpointFileError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointSaveError",
    "NonFiniteWeightError",
    "expected_tensors",
    "load_checkpoint",
    "save_checkpoint",
]

_DECODER = "model."  # what precedes the names of the decoder's tensors
_SHOWN = 5  # names listed in an error before "and N more"
_COMPARED = 1000  # names searched for the nearest: a look through 65,000 would take a minute
_FINITE_CHUNK = 2**24  # elements looked at at once


def load_checkpoint(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    *,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str = "cpu",
    check_finite: bool = False,
    progress: bool = True,
    heads: Mapping[str, Sequence[int]] | None = None,
    lm_head: bool = True,
) -> dict[str, Tensor]:
    """Loads the weights of a checkpoint folder: safetensors or `pytorch_model*.bin`, one file or shards.

    Args:
        folder: holds `model.safetensors`, or shards `model-*-of-*.safetensors` with `model.safetensors.index.json`, or
            the same as `pytorch_model*.bin` (read with weights_only, nothing in them is executed).
        config: says which tensors there must be.
        dtype: of the result. "auto": config.dtype, or that of the stored embedding if the config names none; None: each
            tensor as stored; or torch.float32, torch.float16, torch.bfloat16, or one of these by name.
        device: where the result lies.
        check_finite: read all weights and refuse NaN and infinity (after conversion, so that overflow shows).
        progress: whether to show a bar on stderr, if that is a terminal and loading takes over a second.
        heads: shapes (not empty) of tensors expected beyond those of the causal language model, by name.
        lm_head: False: for a class without `lm_head.weight`. `heads` may then be absent, heads of other classes are
            left in the file, and names may lack their "model.", as where transformers saves a PersimmonModel.

    Returns:
        name -> tensor, in the order of `expected_tensors`, without the harmless buffers of old files, without `lm_head`
        if it is tied. All are contiguous, dense, without gradient, aligned to their element size (not more), and share
        no memory with each other, except that `...mlp.dense_4h_to_h.weight`, logically [hidden, intermediate], lies
        in memory as [intermediate, hidden], one row per neuron: its strides are (1, hidden).
        On the CPU, a tensor whose dtype is the stored one is a view of a private mapping, the down-projection
        excepted. Writing into it changes neither the file nor another process.

    Raises:
        CheckpointError: (a ValueError) one of the classes above, naming file, key, expected and found.
        ValueError: dtype is not one of those named.
    """
    folder = os.fspath(folder)
    files = open_checkpoint(folder)
    expected = tensors_of_class(config, heads, lm_head)
    stored = {name: _name_in(files, names_in_files(config, name)) for name in expected}
    if not lm_head:
        if EMBEDDING.removeprefix(_DECODER) in files:  # transformers' PersimmonModel
            stored = {name: name.removeprefix(_DECODER) for name in expected}
        stored = {name: in_file for name, in_file in stored.items() if in_file in files or name not in (heads or {})}
        head_names = names_in_files(config, text_prefix(config) + HEAD)
        others = {*head_names, *CLASSIFIER_HEADS} - set(stored.values())
        files = {name: file for name, file in files.items() if name not in others}
    shapes = {in_file: expected[name] for name, in_file in stored.items()}
    files = {name: file for name, file in files.items() if name in shapes or not HARMLESS_EXTRAS.search(name)}
    _check_tensors(folder, config, files, shapes)
    embedding, head = (stored.get(text_prefix(config) + name, name) for name in (EMBEDDING, HEAD))
    target = _target_dtype(dtype, config, files[embedding].headers[embedding].dtype)
    if config.get_text_config().tie_word_embeddings and head in files:
        _check_tied_head(files, embedding, head)
    stored = {name: in_file for name, in_file in stored.items() if in_file in files}

    from tqdm import tqdm  # type: ignore[import-untyped]

    sizes = {name: _num_bytes(files[name], name) for name in stored.values()}
    show = progress and sys.stderr.isatty()
    tensors = {}
    with tqdm(
        total=sum(sizes.values()), desc="Loading weights", unit="B", unit_scale=True, delay=1.0, disable=not show
    ) as bar:
        for name, in_file in stored.items():
            tensors[name] = _load_tensor(files[in_file], in_file, target, torch.device(device), check_finite)
            bar.update(sizes[in_file])
    return tensors


def _name_in(files: Mapping[str, WeightFile], names: Sequence[str]) -> str:
    """The first of these names that the files have, else the first. A second one in them is then unexpected."""
    return next((name for name in names if name in files), names[0])


def _load_tensor(
    file: WeightFile, name: str, target: torch.dtype | None, device: torch.device, check_finite: bool
) -> Tensor:
    stored = file.headers[name].dtype
    transpose = name.endswith(DOWN_PROJECTION)
    if not transpose and device.type == "cpu" and target in (None, stored):
        tensor = use_huge_pages(file.view(name))
    else:
        tensor = file.read(name)
        if target is not None:
            tensor = tensor.to(target)
        if transpose:
            tensor = to_neuron_major(tensor)
    if check_finite:
        _check_finite(file, name, tensor)
    return tensor.to(device)  # keeps strides


def _num_bytes(file: WeightFile, name: str) -> int:
    header = file.headers[name]
    assert isinstance(header.dtype, torch.dtype)
    return header.dtype.itemsize * torch.Size(header.shape).numel()


def _target_dtype(
    dtype: torch.dtype | str | None, config: ModelConfig, stored: torch.dtype | str
) -> torch.dtype | None:
    """`stored`: the dtype of the embedding in its file."""
    if dtype == "auto":
        assert isinstance(stored, torch.dtype)
        return config.torch_dtype or stored
    if isinstance(dtype, str):
        dtype = {str(known).removeprefix("torch."): known for known in FLOAT_DTYPES.values()}.get(dtype, dtype)
    if dtype is not None and dtype not in FLOAT_DTYPES.values():
        raise ValueError(f"load_checkpoint: dtype must be 'auto', None, float32, float16 or bfloat16, got {dtype!r}")
    assert not isinstance(dtype, str)
    return dtype


def _check_tied_head(files: dict[str, WeightFile], embedding: str, head: str) -> None:
    """A tied checkpoint may hold the head twice, but not two different ones."""
    file = files.pop(head)
    if not torch.equal(files[embedding].view(embedding), file.read(head)):
        raise CheckpointMismatchError(
            file.path,
            head,
            f"the same values as {embedding}, since tie_word_embeddings is true",
            "other values",
            "Set tie_word_embeddings to false in config.json to use both.",
        )


def _check_finite(file: WeightFile, name: str, tensor: Tensor) -> None:
    rows = max(1, _FINITE_CHUNK // (tensor.numel() // len(tensor)))
    count, first = 0, None
    for start in range(0, len(tensor), rows):
        block = tensor[start : start + rows]
        bad = ~torch.isfinite(block)
        if bad.any():
            if first is None:
                index = bad.nonzero()[0].tolist()
                first = ([start + index[0], *index[1:]], block[tuple(index)].item())
            count += int(bad.sum())
    if first is not None:
        stored = file.headers[name].dtype
        raise NonFiniteWeightError(
            file.path,
            name,
            "finite weights",
            f"{count} of {tensor.numel()} NaN or infinite, the first at {first[0]}: {first[1]}",
            ""
            if stored == tensor.dtype
            else f"They are stored as {stored}, read as {tensor.dtype}: did they overflow?",
        )


# ---- comparing headers with the config ----


def _check_tensors(
    folder: str,
    config: ModelConfig,
    files: Mapping[str, WeightFile],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Names, then shapes, then dtypes, each against what the config implies."""
    tied = config.get_text_config().tie_word_embeddings
    missing = [name for name in expected if name not in files and not (tied and name.endswith(HEAD))]
    unexpected = [name for name in files if name not in expected]
    if missing or unexpected:
        raise _name_error(folder, config, files, missing, unexpected, expected)
    wrong = [name for name in expected if name in files and files[name].headers[name].shape != expected[name]]
    if wrong:
        name, also = wrong[0], f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
        found = f"{list(files[name].headers[name].shape)}{also}"
        hint = "config.json and the weights belong to different models, or one of them is damaged."
        text = config.get_text_config()
        other = text.replace(qk_layernorm_per_head=text.qk_layernorm and not text.qk_layernorm_per_head)
        if re.search(r"\.[qk]_layernorm\.", name) and files[name].headers[name].shape == other.qk_layernorm_shape:
            hint = f"In config.json, set qk_layernorm_per_head to {str(other.qk_layernorm_per_head).lower()}."
        raise CheckpointMismatchError(files[name].path, name, f"shape {list(expected[name])}", found, hint)
    for name, file in files.items():
        stored = file.headers[name].dtype
        if isinstance(stored, str):
            hint = "Quantised and 64-bit checkpoints are not supported: convert it to one of these."
            raise CheckpointMismatchError(file.path, name, "dtype float32, float16 or bfloat16", stored, hint)


def _name_error(
    folder: str,
    config: ModelConfig,
    files: Mapping[str, WeightFile],
    missing: list[str],
    unexpected: list[str],
    expected: Mapping[str, tuple[int, ...]],
) -> CheckpointMismatchError:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        named = []
        for name in unexpected[:_SHOWN]:
            near = difflib.get_close_matches(name[:200], missing[:_COMPARED], n=1, cutoff=0.8)
            named.append(shown(name) + (f", meant to be {near[0]}?" if near else ""))
        parts.append(f"{len(unexpected)} unexpected ({_some(named, len(unexpected))})")
    paths = {files[name].path for name in unexpected} or {file.path for file in files.values()}
    where = paths.pop() if len(paths) == 1 else folder
    num_layers = config.get_text_config().num_hidden_layers
    return CheckpointMismatchError(
        where,
        "tensor names",
        f"the {len(expected)} of a {config.model_type.capitalize()} with {num_layers} layers",
        " and ".join(parts),
        _name_hint(config, missing, unexpected, expected),
    )


def _some(names: list[str], total: int | None = None) -> str:
    total = len(names) if total is None else total
    return ", ".join(names[:_SHOWN]) + (f" and {total - _SHOWN} more" if total > _SHOWN else "")


_FOREIGN_PREFIXES = {
    "module.": "DistributedDataParallel adds it: save model.module.state_dict()",
    "_orig_mod.": "torch.compile adds it: save the state_dict() of the uncompiled model",
    "base_model.model.": "PEFT adds it: call merge_and_unload() and save the result",
    "language_model.": "Fuyu puts its Persimmon there: put Fuyu's own config.json beside the weights",
    "model.language_model.": "Fuyu puts its Persimmon there: put Fuyu's own config.json beside the weights",
    "transformer.": "other model families use it: rename the tensors",
    "": "the model without its head was saved: save the PersimmonForCausalLM",
}


def _name_hint(
    config: ModelConfig, missing: list[str], unexpected: list[str], expected: Mapping[str, tuple[int, ...]]
) -> str:
    """What a person should do about these names, or ""."""
    if any("self_attention." in name or name.startswith("word_embeddings_for_head") for name in unexpected):
        return (
            "These are Adept's original names: `persimmon-fast convert` makes a Hugging Face folder of its checkpoint."
        )
    # A prefix that most of the unexpected names have where an expected one has "model." or nothing
    cores = {name.removeprefix("model.") for name in expected} | expected.keys()
    prefixes: Counter[str] = Counter()
    for name in unexpected:
        starts = [0] + [dot.end() for dot in re.finditer(r"\.", name[:200])]
        core = next((start for start in starts if name[start:] in cores), None)
        if core is not None:
            prefixes[name[:core]] += 1
    if prefixes:
        prefix, count = prefixes.most_common(1)[0]
        why = _FOREIGN_PREFIXES.get(prefix, "rename the tensors")
        return f"{count} names start with {prefix!r} where 'model.' or nothing belongs: {why}."
    num_layers = config.get_text_config().num_hidden_layers
    layers = [int(match[1]) for name in unexpected if (match := re.match(r"[a-z_.]*\blayers\.(\d{1,9})\.", name))]
    if layers and max(layers) >= num_layers:
        return f"num_hidden_layers is {num_layers}, the weights go up to layer {max(layers)}."
    if missing and not unexpected and all(".q_layernorm." in n or ".k_layernorm." in n for n in missing):
        return "Is qk_layernorm false for this model? config.json says true."
    if unexpected and not missing and all(".q_layernorm." in n or ".k_layernorm." in n for n in unexpected):
        return "config.json says that qk_layernorm is false."
    if len(missing) == 1 and missing[0].endswith(HEAD) and not unexpected:
        return "Was the model saved with a tied head? Then set tie_word_embeddings to true in config.json."
    return ""
