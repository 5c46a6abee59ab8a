"""Each script of examples/ runs as a newcomer runs it, without a terminal, and prints what shows that it worked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from cli_helpers import tiny_model
from processes import environment

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def test_every_example_has_a_test():
    tested = {"generate", "chat", "patch_transformers", "fine_tune", "convert"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_generate():
    out = run("generate")
    streamed, *batch = re.split(r"^---- .*\n", out, flags=re.MULTILINE)
    assert streamed.startswith("def read_config(path):\n")
    assert len(streamed.splitlines()) >= 3
    for text, start in zip(batch, ["import os\nimport", "class Stack:\n", "for line in"], strict=True):
        assert text.startswith(start)
        assert len(text.strip()) > len(start) + 3


def test_chat():
    out = run("chat")
    assert re.match(r"human: def add\(a, b\):\nadept:.+\nhuman: class Stack:\nadept:.+\n4 messages\n$", out, re.DOTALL)


def test_patch_transformers():
    out = run("patch_transformers")
    assert "same tokens: True\nclass Stack:\n" in out
    difference = float(re.search(r"largest difference of a logit: (\S+)", out)[1])
    assert 0 < difference < 1e-4  # 0: nothing was patched


def test_fine_tune():
    out = run("fine_tune")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 12
    assert losses[0] > 2
    assert losses[-1] < 0.2
    text = re.search(r"^after: (.*)$", out, re.MULTILINE)[1]
    assert "an ordinary torch loop" in text  # it has learnt the file by heart, and the kernels see the new weights
    assert "ordinary" not in re.search(r"^before: (.*)$", out, re.MULTILINE)[1]


def test_convert():
    out = run("convert")
    assert "iter_0000001/mp_rank_01/model_optim_rng.pt" in out
    assert "2 tensor parallel ranks, 10,515,456 bytes of weights" in out
    assert "same bits as the original: True" in out


def test_a_folder_of_your_own(tmp_path):
    assert run("generate", tiny_model(tmp_path)).startswith("def read_config(path):")
