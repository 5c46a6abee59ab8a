"""Saving Persimmon weights in the Hugging Face layout, all or nothing.

A checkpoint is written to a new folder beside the target, flushed to the disk, and takes the target's name in one step,
so that at every moment the name holds either the whole old content or the whole new one. Where the system cannot
exchange two folders in one step (Linux can), the old folder is moved aside first: a crash between the two renames
leaves the name empty and both folders whole beside it.

What happens to a folder that is already there:
- weights and config.json (transformers' names) are replaced, but only if `overwrite` is true;
- other files (tokenizer, README, generation_config.json) are kept: hard-linked, or copied, into the new folder;
- a folder that holds subfolders, links or devices is refused: it is more than a checkpoint, move it yourself.

A save that is killed leaves a folder `.<name>.saving-<process>-<random>` beside the target, which can be deleted.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from persimmon_fast.checkpoint_files import FLOAT_DTYPES, CheckpointMismatchError, CheckpointSaveError
from persimmon_fast.checkpoint_tensors import EMBEDDING, HEAD, ModelConfig, tensors_of_class, text_prefix
from persimmon_fast.config_file import CONFIG_NAME

_OWNED = re.compile(r"config\.json|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
INDEX_NAME = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
    heads: Mapping[str, tuple[int, ...]] | None = None,
    lm_head: bool = True,
) -> None:
    """Writes config.json and safetensors (shards with an index if above max_shard_size) that transformers loads.

    Extra memory is at most what must be copied of one shard: tensors that are not contiguous (the down-projections as
    `load_checkpoint` lays them) or not on the CPU.

    Args:
        folder: target; its parent must exist or be creatable. See the module for what happens if it is there.
        config: written with the tensors' dtype as its dtype, if they share one.
        tensors: exactly `expected_tensors(config)`, any strides and device, float32, float16 or bfloat16; `lm_head` is
            not written where it is tied and may be absent.
        max_shard_size: bytes, or a number with KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB. A tensor above
            it gets a shard of its own.
        overwrite: whether weights and config.json that are in the folder already may be replaced.
        progress: whether to show a bar on stderr, if that is a terminal and saving takes over a second.
        heads: shapes of tensors beyond those of the causal language model, by name.
        lm_head: False: without `lm_head.weight`, of a class that has none.

    Raises:
        CheckpointMismatchError: tensors do not fit the config.
        CheckpointSaveError: the folder holds what must not be lost, or is no folder.
        ValueError: max_shard_size cannot be understood.
        OSError: the disk refuses. The folder is then as it was.
    """
    limit = parse_size(max_shard_size)
    warn_if_ours_alone(config, stacklevel=4)
    target = Path(os.path.realpath(folder))
    tensors = _checked(target, config, tensors, tensors_of_class(config, heads, lm_head))
    kept = _files_to_keep(target, overwrite)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) == 1:
        config = config.with_dtype(dtypes.pop())

    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.saving-{os.getpid()}-{secrets.token_hex(4)}")
    new.mkdir()
    try:
        (new / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")
        _write_weights(new, tensors, limit, progress)
        for name in kept:
            _link_or_copy(target / name, new / name)
        for path in (*new.iterdir(), new):
            flush(path)
        _take_name(new, target, [*kept, *_owned_files(target)])
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    flush(target.parent)


def warn_if_ours_alone(config: ModelConfig, stacklevel: int) -> None:
    """Says so if transformers cannot load what is written."""
    if config.get_text_config().qk_layernorm_per_head:
        warnings.warn(
            "this model has a qk-layernorm per head (qk_layernorm_per_head), which transformers does not know: "
            "persimmon_fast loads what is saved here, transformers refuses the shapes of q_layernorm and k_layernorm.",
            stacklevel=stacklevel,
        )


def parse_size(size: int | str) -> int:
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", size.upper())
        value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    else:
        value = size if type(size) is int else 0
    if value < 1:
        raise ValueError(f"max_shard_size must be bytes > 0 or such as '5GB', got {size!r}")
    return value


def _checked(
    target: Path, config: ModelConfig, tensors: Mapping[str, Tensor], expected: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors to write, in the order in which they are expected."""
    unexpected = [name for name in tensors if name not in expected]
    if unexpected:
        raise CheckpointMismatchError(str(target), unexpected[0], "no such tensor", f"{len(unexpected)} unexpected")
    embedding, head = (text_prefix(config) + name for name in (EMBEDDING, HEAD))
    if config.get_text_config().tie_word_embeddings and head in expected:
        del expected[head]
        if head in tensors and not torch.equal(tensors[head], tensors[embedding]):
            raise CheckpointMismatchError(
                str(target), head, f"the same values as {embedding}, since tie_word_embeddings is true", "other values"
            )
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointMismatchError(str(target), name, f"a tensor of shape {list(shape)}", "none of that name")
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointMismatchError(str(target), name, f"shape {list(shape)}", str(list(tensor.shape)))
        if tensor.dtype not in FLOAT_DTYPES.values() or tensor.is_meta:
            found = "a meta tensor" if tensor.is_meta else str(tensor.dtype)
            raise CheckpointMismatchError(str(target), name, "float32, float16 or bfloat16 with data", found)
    return {name: tensors[name].detach() for name in expected}


def _owned_files(target: Path) -> list[str]:
    names = os.listdir(target) if target.is_dir() else []
    return sorted(name for name in names if _OWNED.fullmatch(name))


def _files_to_keep(target: Path, overwrite: bool) -> list[str]:
    """Names of the files in the target folder that move over; refuses a folder that must not be replaced."""
    if not target.exists():
        return []
    if not target.is_dir():
        raise CheckpointSaveError(str(target), "folder", "a folder or nothing", "a file")
    for entry in os.scandir(target):
        if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            raise CheckpointSaveError(
                str(target),
                entry.name,
                "plain files in the folder to replace",
                "a subfolder, link or device",
                "Save to a new folder.",
            )
    owned = _owned_files(target)
    if owned and not overwrite:
        hint = "Pass overwrite=True to replace it, or save to a new folder."
        raise CheckpointSaveError(str(target), owned[0], "no checkpoint in the folder", "one", hint)
    return sorted(set(os.listdir(target)) - set(owned))


def plan_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order, each file at most `limit` bytes or one tensor; sizes in bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, start=1)}


def index_text(shards: Mapping[str, list[str]], total_parameters: int, total_size: int) -> str:
    """The content of INDEX_NAME; the size is in bytes."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], limit: int, progress: bool) -> None:
    shards = plan_shards({name: tensor.nbytes for name, tensor in tensors.items()}, limit)
    total = sum(tensor.nbytes for tensor in tensors.values())

    from tqdm import tqdm  # type: ignore[import-untyped]

    show = progress and sys.stderr.isatty()
    with tqdm(total=total, desc="Saving weights", unit="B", unit_scale=True, delay=1.0, disable=not show) as bar:
        for file, names in shards.items():
            save_file(_as_stored({name: tensors[name] for name in names}), folder / file, metadata={"format": "pt"})
            (folder / file).chmod((folder / CONFIG_NAME).stat().st_mode)  # safetensors makes it for its owner alone
            bar.update(sum(tensors[name].nbytes for name in names))
    if len(shards) > 1:
        parameters = sum(tensor.numel() for tensor in tensors.values())
        (folder / INDEX_NAME).write_text(index_text(shards, parameters, total))


def _as_stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two of them in the same memory (safetensors refuses that)."""
    result: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        if tensor.data_ptr() in addresses:
            tensor = tensor.clone()
        addresses.add(tensor.data_ptr())
        result[name] = tensor
    return result


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_name(new: Path, target: Path, old_files: list[str]) -> None:
    """Gives `new` the name `target`; then deletes the old files, which must be the only ones in the old folder."""
    if not target.exists():
        os.rename(new, target)
        return
    if _exchange(new, target):
        old = new
    else:
        old = new.with_name(new.name.replace(".saving-", ".replaced-"))
        os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(old, target)
            raise
    for name in old_files:
        (old / name).unlink(missing_ok=True)
    try:
        old.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        # Somebody put a file there while we wrote: theirs, so keep it.
        print(f"save_checkpoint: files that appeared in {target} meanwhile are now in {old}", file=sys.stderr)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps the names of two folders in one step. False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux, or a C library before glibc 2.28
        return False
    at_cwd, rename_exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h, linux/fs.h
    return bool(renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), rename_exchange) == 0)
