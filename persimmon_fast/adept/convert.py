"""Adept's original checkpoints to the Hugging Face layout, and back.

Memory holds one block of a tensor at a time; a conversion that is interrupted goes on where it was; the result appears
whole, and is the same to the byte whether it was interrupted or not.
"""

from __future__ import annotations

import functools
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

from persimmon_fast.adept import merge, source, write
from persimmon_fast.adept.arguments import ITERATION_KEY, write_arguments
from persimmon_fast.adept.pickles import RankFile, read_rank
from persimmon_fast.adept.rows import LazyTensor, TensorRows
from persimmon_fast.adept.work import WorkFolder, check_target
from persimmon_fast.checkpoint_files import (
    HARMLESS_EXTRAS,
    CheckpointFileError,
    CheckpointMismatchError,
    open_checkpoint,
)
from persimmon_fast.checkpoint_save import INDEX_NAME, index_text, parse_size, plan_shards, warn_if_ours_alone
from persimmon_fast.checkpoint_tensors import EMBEDDING, HEAD, expected_tensors
from persimmon_fast.config import PersimmonConfig
from persimmon_fast.config_file import CONFIG_NAME
from persimmon_fast.integrations.tokenizer import is_unigram, save_for_both
from persimmon_fast.tokenizer import MODEL_NAMES, PersimmonTokenizer

END_OF_TEXT, END_OF_TEXT_ID = "|ENDOFTEXT|", 71013  # the piece, and its id in the released tokenizer
RELEASED_VOCAB_SIZE = 262144


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        target: the folder that was written.
        config: of the model.
        num_bytes: of weights.
        num_ranks: tensor parallel ranks of Adept's side.
        foreign: classes of other packages that the pickles name and that were not imported.
        resumed: whether an earlier, interrupted run had begun.
    """

    target: Path
    config: PersimmonConfig
    num_bytes: int
    num_ranks: int
    foreign: tuple[str, ...] = ()
    resumed: bool = False


def to_hugging_face(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    md5: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Conversion:
    """Writes config.json, generation_config.json, tokenizer and safetensors of one of Adept's checkpoints.

    Args:
        path: the release tar (read in place), the folder that it holds, one iteration, or one `model_optim_rng.pt`.
        target: a new or empty folder.
        md5: of the tar, compared before anything else. None: the published one if the file has a published name.
        max_shard_size: as in `save_checkpoint`.
        progress: whether to show bars on stderr, if that is a terminal.

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete, no Persimmon, or asks for code to be run; or the target
            cannot be written.
    """
    limit = parse_size(max_shard_size)
    path = os.path.abspath(path)
    check_target(Path(os.path.realpath(target)))
    expected_md5 = md5 or source.PUBLISHED_MD5.get(os.path.basename(path))
    if expected_md5 is not None and (md5 is not None or os.path.isfile(path)):
        if not os.path.isfile(path):
            raise CheckpointFileError(path, "MD5", "a file", "a folder", "Only a file has an MD5.")
        source.check_md5(path, expected_md5, progress)
    found = source.open_source(path)
    ranks = [read_rank(member) for member in found.ranks]
    config, tensors = merge.merged(ranks)
    tokenizer = _tokenizer(found, ranks[0], config)
    config = _with_ids(found, config, tokenizer)
    iteration = found.iteration if found.iteration is not None else ranks[0].iteration
    if iteration is not None:
        config = config.replace(extra={ITERATION_KEY: iteration})

    warn_if_ours_alone(config, stacklevel=3)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shards = plan_shards(sizes, limit)
    small: dict[str, str | bytes] = {CONFIG_NAME: config.to_json_string()}
    stop_ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    small["generation_config.json"] = json.dumps(stop_ids, indent=2) + "\n"
    if len(shards) > 1:
        parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
        small[INDEX_NAME] = index_text(shards, parameters, sum(sizes.values()))
    if tokenizer is not None:
        small |= _tokenizer_files(tokenizer)
    large = {
        file: _Output({name: tensors[name] for name in names}, write.write_safetensors)
        for file, names in shards.items()
    }
    resumed = _write_all(target, [member.path for member in found.ranks], small, large, progress)
    foreign = dict.fromkeys(name for rank in ranks for name in rank.foreign)
    return Conversion(Path(target), config, sum(sizes.values()), len(ranks), tuple(foreign), resumed)


def to_adept(
    folder: str | os.PathLike[str], target: str | os.PathLike[str], *, num_ranks: int = 1, progress: bool = True
) -> Conversion:
    """Writes a checkpoint in Adept's layout from a Hugging Face folder.

    Args:
        folder: config.json, weights, and a tokenizer if it is to be taken along.
        target: a new or empty folder.
        num_ranks: tensor parallel ranks to split the model over.
        progress: whether to show a bar on stderr, if that is a terminal.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit its config; or the target cannot be written.
        ConfigError: config.json is wrong, or Adept's format cannot say what it says.
    """
    folder = os.path.abspath(folder)
    check_target(Path(os.path.realpath(target)))
    config = PersimmonConfig.from_pretrained(folder)
    tensors = _our_tensors(folder, config)
    arguments = write_arguments(config, tensors[EMBEDDING].dtype, num_ranks)
    split = merge.split(config, tensors, num_ranks)
    iteration = config.extra.get(ITERATION_KEY)
    iteration = iteration if type(iteration) is int and iteration > 0 else 1  # Adept's loader refuses 0
    small: dict[str, str | bytes] = {source.TRACKER_NAME: str(iteration)}
    vocabulary = next((Path(folder, name) for name in MODEL_NAMES if Path(folder, name).is_file()), None)
    if vocabulary is not None:
        small["adept_vocab.model"] = vocabulary.read_bytes()
    content = {"args": arguments, "checkpoint_version": 3.0, "iteration": iteration}
    large = {
        f"iter_{iteration:07}/mp_rank_{rank:02}/model_optim_rng.pt": _Output(
            parts, functools.partial(_write_rank, content=content)
        )
        for rank, parts in enumerate(split)
    }
    sources = sorted({os.path.join(folder, name) for name in os.listdir(folder)})
    resumed = _write_all(target, sources, small, large, progress)
    return Conversion(Path(target), config, sum(t.nbytes for t in tensors.values()), num_ranks, (), resumed)


def _write_rank(
    file: IO[bytes], tensors: Mapping[str, LazyTensor], progress: write.Progress, *, content: Mapping[str, Any]
) -> None:
    write.write_torch(file, {**content, "model": write.model_content(tensors)}, progress)


# ---- writing ----


@dataclass(frozen=True)
class _Output:
    """One large file: its tensors and who writes them."""

    tensors: Mapping[str, LazyTensor]
    write: Callable[[IO[bytes], Mapping[str, LazyTensor], write.Progress], None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _write_all(
    target: str | os.PathLike[str],
    sources: Sequence[str],
    small: Mapping[str, str | bytes],
    large: Mapping[str, _Output],
    progress: bool,
) -> bool:
    """Writes the large files, then the small ones. Returns whether some were there from an earlier run."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    facts = [(os.path.realpath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in sources]
    layout = {
        file: [(name, str(t.dtype), t.shape) for name, t in output.tensors.items()] for file, output in large.items()
    }
    texts = {name: data if isinstance(data, str) else data.hex() for name, data in small.items()}
    show = progress and sys.stderr.isatty()
    with WorkFolder(target, json.dumps([facts, layout, texts])) as work:
        missing = {file: output for file, output in large.items() if not work.is_done(file)}
        work.require_space(sum(output.nbytes for output in missing.values()))
        total = sum(output.nbytes for output in large.values())
        done = total - sum(output.nbytes for output in missing.values())
        with tqdm(
            total=total, initial=done, desc="Converting", unit="B", unit_scale=True, delay=1.0, disable=not show
        ) as bar:
            for file, output in missing.items():
                work.write(file, lambda stream, output=output: output.write(stream, output.tensors, bar.update))  # type: ignore[misc]
        for name, data in small.items():
            content = io.BytesIO(data.encode() if isinstance(data, str) else data)
            work.write(name, lambda stream, content=content: stream.write(content.getvalue()))  # type: ignore[misc]
        work.finish()
    return len(missing) < len(large)


# ---- reading ----


def _our_tensors(folder: str, config: PersimmonConfig) -> dict[str, LazyTensor]:
    """The tensors of a Hugging Face folder, mapped; the head left out where it is tied."""
    files = open_checkpoint(folder)
    expected = expected_tensors(config)
    if config.tie_word_embeddings:
        del expected[HEAD]
    for name, file in files.items():
        if (
            name not in expected
            and not HARMLESS_EXTRAS.search(name)
            and not (name == HEAD and config.tie_word_embeddings)
        ):
            raise CheckpointMismatchError(
                file.path, name, f"the tensors of a Persimmon of {config.num_hidden_layers} layers", "it"
            )
    result = {}
    for name, shape in expected.items():
        if name not in files:
            raise CheckpointMismatchError(folder, name, f"a tensor of shape {list(shape)}", "none of that name")
        header = files[name].headers[name]
        if header.shape != shape:
            raise CheckpointMismatchError(files[name].path, name, f"shape {list(shape)}", str(list(header.shape)))
        if isinstance(header.dtype, str):
            raise CheckpointMismatchError(files[name].path, name, "float32, float16 or bfloat16", header.dtype)
        result[name] = LazyTensor(header.dtype, shape, TensorRows(files[name].view(name)))
    return result


def _tokenizer(found: source.AdeptSource, rank: RankFile, config: PersimmonConfig) -> PersimmonTokenizer | None:
    """As Adept's, it ends a text with |ENDOFTEXT|, else with sentencepiece's own end."""
    named = rank.arguments.get("sp_model_file")
    member = found.tokenizer(*([os.path.basename(named)] if isinstance(named, str) else []))
    if member is None:
        return None
    tokenizer = PersimmonTokenizer(member.read(), source=member.name, model_max_length=config.max_position_embeddings)
    if tokenizer.vocab_size > config.vocab_size:
        expected = f"at most the {config.vocab_size} pieces that the embedding has rows for"
        raise CheckpointMismatchError(member.name, "pieces", expected, str(tokenizer.vocab_size))
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    if tokenizer.convert_ids_to_tokens(end) == END_OF_TEXT:
        tokenizer.bos_token_id = tokenizer.eos_token_id = tokenizer.pad_token_id = end
    return tokenizer


def _tokenizer_files(tokenizer: PersimmonTokenizer) -> dict[str, bytes]:
    """For our tokenizer, and where the package tokenizers is installed for transformers' too: of `tokenizer.model`
    alone, its AutoTokenizer makes other ids."""
    with tempfile.TemporaryDirectory() as folder:
        if find_spec("tokenizers") is not None and is_unigram(tokenizer):
            save_for_both(tokenizer, folder)
        else:
            tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _with_ids(
    found: source.AdeptSource, config: PersimmonConfig, tokenizer: PersimmonTokenizer | None
) -> PersimmonConfig:
    if tokenizer is not None:
        return config.replace(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    where = f"{found.path}: no sentencepiece model (adept_vocab.model) beside the weights, so no tokenizer is written"
    if config.vocab_size == RELEASED_VOCAB_SIZE:
        warnings.warn(f"{where}; texts end with {END_OF_TEXT} = {END_OF_TEXT_ID}, as in the release", stacklevel=3)
        return config.replace(bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID)
    warnings.warn(f"{where}, and no token ends a text: set eos_token_id in {CONFIG_NAME}", stacklevel=3)
    return config
