"""Loads damaged checkpoints and configs and looks for crashes, hangs and faults that load.

    python tools/fuzz_checkpoints.py --count 2000 --seed 0

Each case takes a small valid checkpoint in one of five formats, damages it (see MUTATIONS), and loads it in a worker
process. A case passes if the error is a CheckpointError or ConfigError that names a file of the case, or if what loads
has exactly the expected names, shapes and dtypes and holds no value that is not in the files. Everything else is a
fault: another exception, a worker that dies or does not answer, a gadget of a pickle that ran.

Case i of seed s is always the same: `--only i` runs it alone and prints the error.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

TIME_LIMIT = 20.0  # seconds for one case before it counts as a hang; they take about 0.01
MEMORY_LIMIT = 8 << 30  # address space of a worker in bytes: a header must not make it allocate what it likes


# ---- in the worker ----


def run_case(seed: int, index: int) -> dict[str, Any]:
    """Makes, loads and judges one case: {"index", "mutation", "outcome": "refused" | "loaded" | "fault", "detail"}."""
    import fuzz_mutations

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    sentinel = folder.with_suffix(".ran")
    try:
        mutation = fuzz_mutations.damage(folder, sentinel, random.Random(f"{seed}-{index}"))
        try:
            outcome, detail = judge(folder)
        except Exception as error:
            outcome, detail = "fault", f"{type(error).__name__}: {str(error)[:500]}"
        if sentinel.exists():
            outcome, detail = "fault", "code from the pickle was executed"
        return {"index": index, "mutation": mutation, "outcome": outcome, "detail": detail}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        sentinel.unlink(missing_ok=True)


def judge(folder: Path) -> tuple[str, str]:
    """Loads a folder; raises AssertionError for a fault."""
    from fuzz_mutations import CONFIG

    from persimmon_fast.checkpoint import CheckpointError, load_checkpoint
    from persimmon_fast.config import ConfigError, PersimmonConfig

    errors, config = [], CONFIG
    try:
        config = PersimmonConfig.from_pretrained(folder)
    except ConfigError as error:
        errors.append(str(error))
    else:
        check_config(config)
    try:
        weights = load_checkpoint(folder, config, dtype=None, progress=False)
    except CheckpointError as error:
        errors.append(str(error))
    else:
        check_weights(folder, config, weights)
    for message in errors:
        assert str(folder) in message, f"names no file: {message}"
        assert ": expected " in message, f"says not what was expected: {message}"
        assert ", found " in message, f"says not what was found: {message}"
        assert len(message) < 2000, f"{len(message)} characters: {message[:200]}"
        assert message.isprintable(), f"control characters: {message!r}"
    return ("refused", errors[0]) if errors else ("loaded", "")


def check_config(config: Any) -> None:
    """A config that was accepted must survive its own JSON and give finite rotary tables."""
    import torch

    from persimmon_fast.config import PersimmonConfig
    from persimmon_fast.rope import rope_cos_sin

    assert PersimmonConfig.from_dict(json.loads(config.to_json_string())) == config, "changes through its own JSON"
    assert config.num_parameters > 0
    if config.rotary_dim < 10**6:
        for seq_len in (1, config.max_position_embeddings, 2 * config.max_position_embeddings):
            assert torch.isfinite(rope_cos_sin(config, 3, seq_len)).all(), "rotary table is not finite"


def check_weights(folder: Path, config: Any, weights: dict[str, Any]) -> None:
    """What loaded must be the tensors of the config and hold nothing but bytes of the files."""
    import numpy as np
    import torch

    from persimmon_fast.checkpoint import expected_tensors

    expected = expected_tensors(config)
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == expected, "names or shapes that are not the config's"
    content = b"".join(path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file())
    for name, tensor in weights.items():
        assert tensor.dtype in (torch.float32, torch.float16, torch.bfloat16), f"{name}: {tensor.dtype}"
        whole = tensor.t() if name.endswith("dense_4h_to_h.weight") else tensor
        assert whole.is_contiguous(), f"{name}: strides {tensor.stride()}"
        assert tensor.device.type == "cpu"
        assert type(tensor) is torch.Tensor
        size = tensor.element_size()
        word = {2: np.uint16, 4: np.uint32}[size]
        found = whole.reshape(-1).view(torch.uint8).numpy().view(word)
        there = [
            np.frombuffer(content[start : start + (len(content) - start) // size * size], word) for start in range(size)
        ]
        assert np.isin(found, np.concatenate(there)).all(), f"{name}: values that are not in the file"


def work() -> None:
    """Answers each line `seed index` on stdin with one line of JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        seed, index = (int(word) for word in line.split())
        if index == -1:  # -1 to -3: what the supervisor must notice, for its own test
            os.abort()
        if index == -2:
            time.sleep(10 * TIME_LIMIT)
        if index == -3:
            result: dict[str, Any] = {"index": index, "mutation": "none", "outcome": "fault", "detail": "on purpose"}
        else:
            result = run_case(seed, index)
        print(json.dumps(result), flush=True)


# ---- in the supervisor ----


class Worker:
    """A worker process that is started when needed and replaced when it dies or hangs."""

    def __init__(self, seed: int, time_limit: float) -> None:
        self.seed, self.time_limit = seed, time_limit
        self.process: subprocess.Popen[str] | None = None

    def run(self, index: int) -> dict[str, Any]:
        if self.process is None:
            command = [sys.executable, __file__, "--worker"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.ask(0, 120.0)  # the first answer includes importing torch
        return self.ask(index, self.time_limit)

    def ask(self, index: int, limit: float) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{self.seed} {index}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else ""
        if line:
            result: dict[str, Any] = json.loads(line)
            return result
        detail = "the process died" if ready else f"no answer in {limit:.0f} s"
        self.close()
        return {"index": index, "mutation": "?", "outcome": "fault", "detail": detail}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def fuzz(seed: int, indices: list[int], jobs: int, time_limit: float = TIME_LIMIT) -> Iterator[dict[str, Any]]:
    """Runs the cases in `jobs` processes and yields their results as they come, part by part."""

    def run_part(part: list[int]) -> Iterator[dict[str, Any]]:
        worker = Worker(seed, time_limit)
        try:
            for index in part:
                yield worker.run(index)
        finally:
            worker.close()

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        parts = [indices[start::jobs] for start in range(jobs)]
        for results in pool.map(lambda part: list(run_part(part)), parts):
            yield from results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="cases to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--only", type=int, help="run this one case and print what it says")
    parser.add_argument("--messages", action="store_true", help="print the error of every case")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return 0
    indices = list(range(arguments.count)) if arguments.only is None else [arguments.only]
    start, outcomes, faults = time.monotonic(), Counter[tuple[str, str]](), []
    for result in fuzz(arguments.seed, indices, arguments.jobs):
        outcomes[result["mutation"], result["outcome"]] += 1
        if result["outcome"] == "fault":
            faults.append(result)
        if arguments.messages or arguments.only is not None:
            print(f"{result['index']:6} {result['mutation']:32} {result['outcome']:8} {result['detail']}")
    print(f"{'mutation':32} {'refused':>8} {'loaded':>8} {'fault':>8}")
    for mutation in sorted({mutation for mutation, _ in outcomes}):
        counts = [outcomes[mutation, outcome] for outcome in ("refused", "loaded", "fault")]
        print(f"{mutation:32} {counts[0]:8} {counts[1]:8} {counts[2]:8}")
    for result in faults:
        print(f"FAULT case {result['index']} ({result['mutation']}): {result['detail']}")
    refused = sum(count for (_, outcome), count in outcomes.items() if outcome == "refused")
    print(f"{len(indices)} cases in {time.monotonic() - start:.0f} s: {refused} refused, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
