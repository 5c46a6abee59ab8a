"""`persimmon-fast info`: the sizes of a model and the speed that memory allows it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon_fast import SMALL_MODEL
from persimmon_fast.cli import terminal
from persimmon_fast.cli.terminal import UsageError, bytes_text
from persimmon_fast.config import PersimmonConfig
from persimmon_fast.costs import DTYPE_BYTES, Costs, model_costs

if TYPE_CHECKING:
    from rich.table import Table

_ZEROS = 0.9  # Adept: squared ReLU often leaves more than 90 % zeros
_SHARES = (0.0, _ZEROS)


@dataclass(frozen=True)
class Speed:
    """A decode step of one sequence, limited by memory alone.

    Attributes:
        zeros: share of the neurons that are zero, so that their weights are not read.
        context: tokens in the cache.
        bytes_per_token: what the step reads.
        tokens_per_second: bandwidth / bytes_per_token.
    """

    zeros: float
    context: int
    bytes_per_token: float
    tokens_per_second: float


def run(folder: Path | None, bandwidth: float | None, as_json: bool) -> int:
    """Prints the facts about a model folder; bandwidth in 1e9 bytes/s, None: measured now."""
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise UsageError(f"--bandwidth must be a number > 0, got {bandwidth}")
    folder = folder or SMALL_MODEL
    config = PersimmonConfig.from_pretrained(folder)
    dtype = str(config.dtype or "bfloat16")
    costs = model_costs(config, dtype)
    with terminal.transient_line("Measuring memory bandwidth ...", bandwidth is None):
        rate, source = _bandwidth(bandwidth)
    speeds = [
        Speed(zeros, context, costs.decode_bytes(context, zeros), rate / costs.decode_bytes(context, zeros))
        for context in (0, config.max_position_embeddings)
        for zeros in _SHARES
    ]
    if as_json:
        print(json.dumps(_as_json(folder, config, costs, dtype, rate, source, speeds)))
    else:
        _print(folder, config, costs, dtype, rate, source, speeds)
    return 0


def _bandwidth(given: float | None) -> tuple[float, str]:
    """(bytes per second, where the figure is from)."""
    if given is not None:
        return given * 1e9, "given"
    import torch

    from persimmon_fast import measure

    threads = torch.get_num_threads()
    return measure.read_bandwidth(), f"measured now, {threads} thread" + "s" * (threads != 1)


def _as_json(
    folder: Path, config: PersimmonConfig, costs: Costs, dtype: str, rate: float, source: str, speeds: list[Speed]
) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "config": config.to_dict(),
        "dtype": dtype,
        "parameters": costs.parameters | {"total": costs.total_parameters},
        "bytes": {name: costs.total_parameters * itemsize for name, itemsize in DTYPE_BYTES.items()},
        "cache_bytes_per_token": costs.cache_bytes_per_token,
        "cache_bytes_full": costs.cache_bytes_per_token * config.max_position_embeddings,
        "decode_bytes_per_token": costs.weight_bytes_per_token,
        "zero_skipping_share": costs.skippable_bytes_per_token / costs.weight_bytes_per_token,
        "bandwidth_bytes_per_second": rate,
        "bandwidth_source": source,
        "expected": [asdict(speed) for speed in speeds],
    }


def _print(
    folder: Path, config: PersimmonConfig, costs: Costs, dtype: str, rate: float, source: str, speeds: list[Speed]
) -> None:
    out = terminal.console()
    out.print(folder.resolve().name, style=f"bold {terminal.ACCENT}", end="")
    out.print(f"  {folder}", style="dim", soft_wrap=True)
    cache = costs.cache_bytes_per_token
    skippable = costs.skippable_bytes_per_token / costs.weight_bytes_per_token
    costs_facts = {
        "cache": f"{cache:,} bytes a token in {dtype}, {bytes_text(cache * config.max_position_embeddings)} at "
        f"{config.max_position_embeddings:,} tokens",
        "decode reads": f"{bytes_text(costs.weight_bytes_per_token)} of weights a token in {dtype}; {skippable:.1%} of "
        "them, the MLP's down-projection, only for neurons that are not zero",
        "bandwidth": f"{rate / 1e9:.1f} GB/s ({source})",
    }
    blocks = [
        terminal.facts(_config_facts(config, dtype)),
        _parameter_table(costs),
        terminal.facts(costs_facts),
        _speed_table(speeds),
    ]
    for block in blocks:
        out.print(block)
        out.print()
    if note := _cache_note(costs, source):
        out.print(note, style="dim")


def _config_facts(config: PersimmonConfig, dtype: str) -> dict[str, str]:
    rotary = f"rotary on {config.rotary_dim} of {config.head_dim}, theta {config.rope_theta:,.0f}"
    if config.rope_type != "default":
        rotary += f", {config.rope_type} scaling"
    norm = "with" if config.qk_layernorm else "without"
    return {
        "layers": f"{config.num_hidden_layers}, {config.num_attention_heads} heads of {config.head_dim}, {norm} "
        "qk-layernorm",
        "width": f"{config.hidden_size:,}, MLP {config.intermediate_size:,} ({config.hidden_act})",
        "vocabulary": f"{config.vocab_size:,}, " + ("tied head" if config.tie_word_embeddings else "head of its own"),
        "positions": f"{config.max_position_embeddings:,}, {rotary}",
        "end of text": ", ".join(map(str, config.eos_token_ids)) or "no token",
        "dtype": dtype if config.dtype else f"{dtype} assumed, config.json names none",
    }


def _parameter_table(costs: Costs) -> Table:
    table = terminal.table("", "parameters", "share", "float32", "16 bit")
    for part, count in [*costs.parameters.items(), ("total", costs.total_parameters)]:
        share = count / costs.total_parameters
        sizes = [bytes_text(count * DTYPE_BYTES[dtype]) for dtype in ("float32", "bfloat16")]
        is_total = part == "total"
        table.add_row(part, f"{count:,}", f"{share:.1%}", *sizes, style="bold" if is_total else "")
    return table


def _speed_table(speeds: list[Speed]) -> Table:
    table = terminal.table("decode, limited by memory alone", "bytes a token", "tokens/s")
    for speed in speeds:
        context = f"{speed.context:,} tokens in the cache" if speed.context else "short context"
        zeros = f"{speed.zeros:.0%} of neurons zero" if speed.zeros else "no neuron skipped"
        table.add_row(
            f"{context}, {zeros}", bytes_text(speed.bytes_per_token), terminal.rate_text(speed.tokens_per_second)
        )
    return table


def _cache_note(costs: Costs, source: str) -> str:
    """A model that fits into the processor's cache is not limited by memory: say so."""
    if source == "given":
        return ""
    from persimmon_fast import measure

    cache = measure.last_level_cache()
    if cache is None or costs.weight_bytes_per_token > cache:
        return ""
    return f"These weights fit into this processor's {bytes_text(cache)} cache, which is faster than memory."
