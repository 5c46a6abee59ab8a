"""What the tests of the command line share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon_fast import SMALL_MODEL, PersimmonConfig, PersimmonForCausalLM, PersimmonTokenizer, cli

PROMPT = "def read_config(path):"


def tiny_model(folder: Path) -> Path:
    """Saves a random model with the tokenizer that ships with the package; it samples unless told otherwise."""
    tokenizer = PersimmonTokenizer.from_pretrained(SMALL_MODEL)
    config = PersimmonConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        eos_token_id=None,  # only length and stop strings end a text
    )
    torch.manual_seed(0)
    model = PersimmonForCausalLM(config)
    for parameter in model.parameters():  # far from uniform, so that choices differ
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = model.generation_config.replace(do_sample=True, top_p=0.9)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*arguments: object) -> int:
    """Runs a command line here, on the CPU unless it says otherwise; the threads that it sets are its own."""
    if arguments[:1] in (("generate",), ("chat",)) and "--device" not in arguments:
        arguments = (*arguments, "--device", "cpu")
    threads = torch.get_num_threads()
    try:
        return cli.run([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)


def edited(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a model folder with other values in its config.json; None removes a key."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").unlink()
    removed = [key for key, value in changes.items() if value is None]
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in removed}))
    return target


def generated(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What `generate --json` prints; it must succeed and print nothing else."""
    assert run("generate", "-m", folder, "--json", *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    return json.loads(captured.out)  # type: ignore[no-any-return]
