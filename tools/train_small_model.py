"""Train the small Persimmon that the package ships, on the sources of Python's standard library.

    python tools/train_small_model.py prepare                  # collect files, train the tokenizer, encode
    python tools/train_small_model.py train --minutes 55       # resumes from its checkpoint if there is one
    python tools/train_small_model.py export                   # weights, config and model card

Plain PyTorch, no other part of this package: the trained weights must not depend on the code they test. The model is
in small_persimmon.py. Design choices:
- Files are split whole into train and held-out by a hash of their path, so no held-out text is ever seen.
- A file is encoded with BOS in front and EOS behind. The training stream holds each file once whole and once
  cut into its top-level statements, since a prompt such as "def f(x):" starts with BOS and a dummy prefix.
- Pieces that end a line are sometimes split before the line end, as the end of a prompt is.
- The learning rate follows the clock, not a step count: a slower machine trains less but ends on time.
- Windows grow from 256 to 1024 tokens, so every position is trained and the attention of early steps is cheap.
"""

import argparse
import hashlib
import io
import json
import math
import random
import re
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_persimmon import (
    BOS,
    CONFIG,
    EOS,
    GENERATION,
    POSITIONS,
    VOCAB,
    Persimmon,
    held_out_loss,
    sample,
    zero_shares,
)
from torch import nn

from persimmon_fast import PersimmonTokenizer
from persimmon_fast.integrations.tokenizer import save_for_both

SAMPLE_PROMPTS = ("def read_config(path):", "class Stack:", "import os\n")

HELD_OUT_PERCENT = 5
SCHEDULE = ((0.4, 256), (0.8, 512), (math.inf, POSITIONS))  # (until this share of the time, window length)
SKIPPED_FOLDERS = {
    *("site-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),  # generated character tables and generated help text
}


# ---------------------------------------------------------------- data


def collect() -> tuple[dict[str, str], dict[str, str]]:
    """The standard library's sources as {relative path: text}, split into (train, held_out)."""
    root = Path(sysconfig.get_path("stdlib"))
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        if folders & SKIPPED_FOLDERS or relative.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        text = path.read_text(encoding="utf-8")
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        is_held_out = int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT
        (held_out if is_held_out else train)[relative.as_posix()] = text
    return train, held_out


def train_tokenizer(texts: list[str]) -> bytes:
    """Serialized sentencepiece Unigram model: byte fallback, indentation and line ends inside pieces."""
    chunks = [text[i : i + 4000] for text in texts for i in range(0, len(text), 4000)]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(chunks),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        max_sentence_length=100_000,
        max_sentencepiece_length=20,
        character_coverage=0.9999,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=2,
        minloglevel=1,
    )
    return model.getvalue()


def top_level_statements(text: str) -> list[str]:
    """Cut before each unindented def, class, decorator or import; the cut text joined is the text."""
    return [
        part
        for part in re.split(r"^(?=(?:async )?def |class |@|import |from )", text, flags=re.MULTILINE)
        if len(part) >= 80
    ]


def split_line_ends(sp: spm.SentencePieceProcessor, ids: list[int], rng: random.Random) -> list[int]:
    """Split one in five pieces such as ":\\n" before the line end, into ":" and "\\n".

    A prompt that ends in ":" is encoded without its line end. Had the model seen ":\\n" alone, it would have learnt
    that a bare ":" is never followed by a new line.
    """
    result: list[int] = []
    for token_id in ids:
        head, line_end, tail = sp.id_to_piece(token_id).partition("\n")
        halves = sp.piece_to_id([head, line_end + tail])
        if head and line_end and sp.unk_id() not in halves and rng.random() < 0.2:
            result += halves
        else:
            result.append(token_id)
    return result


def prepare(work: Path) -> None:
    train, held_out = collect()
    model = train_tokenizer(list(train.values()))
    (work / "tokenizer.model").write_bytes(model)
    sp = spm.SentencePieceProcessor(model_proto=model)
    assert sp.vocab_size() == VOCAB, f"the trainer made {sp.vocab_size()} pieces"
    for name, text in {**train, **held_out}.items():
        assert sp.decode(sp.encode(text)) == text, f"{name} does not survive encode + decode"

    def stream(documents: list[list[int]]) -> np.ndarray:
        return np.array([i for ids in documents for i in [BOS, *ids, EOS]], dtype=np.uint16)

    rng = random.Random(0)
    pieces = [part for text in train.values() for part in top_level_statements(text)]
    rng.shuffle(pieces)
    whole = list(train.values())
    rng.shuffle(whole)
    tokens = {
        "train": stream([split_line_ends(sp, sp.encode(text), rng) for text in whole + pieces]),
        "held_out": stream([sp.encode(text) for text in held_out.values()]),
    }
    for name, array in tokens.items():
        np.save(work / f"{name}.npy", array)
    facts = {
        "python": sys.version.split()[0],
        "train_files": len(train),
        "train_bytes": sum(len(text.encode()) for text in train.values()),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in held_out.values()),
        "train_tokens": sum(len(sp.encode(text)) for text in whole),
        "train_stream_tokens": len(tokens["train"]),
        "held_out_tokens": len(tokens["held_out"]),
        "held_out_names": sorted(held_out),
    }
    (work / "data.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps({k: v for k, v in facts.items() if k != "held_out_names"}))


# ---------------------------------------------------------------- training


def make_optimizer(model: Persimmon, lr: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train(rank: int, work: Path, minutes: float, lr: float, batch_tokens: int, compiled: bool, world: int) -> None:
    """One of `world` single-threaded processes, each with its share of every batch.

    They meet once per step. Threads would meet at every operation, and a busy machine makes each such meeting wait
    for the slowest thread (5 times slower when measured on 2 cores beside one other busy process).
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{(work / 'meeting').resolve()}", rank=rank, world_size=world)
    data = {name: np.load(work / f"{name}.npy") for name in ("train", "held_out")}
    model = Persimmon()
    optim = make_optimizer(model, lr)
    step, seen, elapsed = 0, 0, 0.0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optim.load_state_dict(state["optim"])
        step, seen, elapsed = state["step"], state["seen"], state["elapsed"]
    parameters = list(model.parameters())
    sizes = [*(p.numel() for p in parameters), 2]
    loss_fn = torch.compile(model.loss, dynamic=False) if compiled else model.loss

    def save() -> None:
        state = {"model": model.state_dict(), "optim": optim.state_dict()}
        state |= {"step": step, "seen": seen, "elapsed": elapsed, "minutes": minutes}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    start = time.monotonic() - elapsed
    while elapsed < 60 * minutes:
        progress = elapsed / (60 * minutes)
        seqlen = next(length for until, length in SCHEDULE if progress < until)
        rate = lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optim.param_groups:
            group["lr"] = rate
        # A fresh generator per step makes a resumed run draw the same windows.
        starts = np.random.default_rng(step).integers(0, len(data["train"]) - seqlen, batch_tokens // seqlen)
        window = np.stack([data["train"][s : s + seqlen + 1].astype(np.int64) for s in starts[rank::world]])
        loss = loss_fn(torch.from_numpy(window))
        loss.backward()
        # The mean loss and the clock travel with the gradients, so that all processes decide alike.
        shared = torch.cat(
            [p.grad.flatten() for p in parameters] + [torch.tensor([loss.item(), time.monotonic() - start])]
        )
        dist.all_reduce(shared)
        *gradients, report = (shared / world).split(sizes)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optim.step()
        optim.zero_grad(set_to_none=True)
        step, seen, elapsed = step + 1, seen + batch_tokens, report[1].item()
        if rank == 0 and step % 20 == 0:
            print(f"step {step} {elapsed:.0f} s loss {report[0]:.4f} norm {norm:.2f} lr {rate:.2e}", flush=True)
        if rank == 0 and step % 200 == 0:
            held_out = held_out_loss(model, data["held_out"], limit=50)
            speed = seen / elapsed
            print(f"held-out {held_out:.4f} at step {step}, {seen / 1e6:.1f} M tokens, {speed:.0f}/s", flush=True)
            save()
    if rank == 0:
        save()
        print(
            f"held-out {held_out_loss(model, data['held_out']):.4f} at the end, step {step}, {seen} tokens", flush=True
        )
    dist.destroy_process_group()


# ---------------------------------------------------------------- export


def export(work: Path, folder: Path, note: str) -> None:
    """Write the folder in the layout of transformers, with a card of measured facts."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    facts = json.loads((work / "data.json").read_text())
    tokens = np.load(work / "held_out.npy")
    sp = spm.SentencePieceProcessor(model_file=str(work / "tokenizer.model"))
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in state["model"].items()}
    model = Persimmon()
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})  # what is shipped, in fp32
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.model").write_bytes((work / "tokenizer.model").read_bytes())
    for name, content in (("config", CONFIG), ("generation_config", GENERATION)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    save_for_both(PersimmonTokenizer.from_pretrained(folder), folder)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        loss = held_out_loss(model, tokens)
    facts |= {"loss": loss, "bits": loss / math.log(2) * len(tokens) / facts["held_out_bytes"]}
    facts |= {
        "note": note and f"\n{note}\n",
        "parameters": sum(weight.numel() for weight in weights.values()),
        "steps": state["step"],
    }
    facts |= {"seen": state["seen"] / 1e6, "minutes": state["elapsed"] / 60, **GENERATION}
    facts["epochs"] = state["seen"] / facts["train_stream_tokens"] * 2  # the stream holds each file twice
    facts["zeros"] = ", ".join(f"{100 * share:.1f} %" for share in zero_shares(model, tokens))
    blocks = [f"```python\n{sample(model, sp, prompt, 120, seed=0).rstrip()}\n```" for prompt in SAMPLE_PROMPTS]
    facts["samples"] = "\n\n".join(blocks)
    card = Path(__file__).with_name("small_model_card.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card.format(**facts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "train", "export"])
    parser.add_argument("--work", type=Path, default=Path("build/small_model"), help="working files")
    parser.add_argument("--to", type=Path, default=Path("persimmon_fast/assets/persimmon-small"), help="for export")
    parser.add_argument("--note", default="", help="for export: what the card should say about this very run")
    parser.add_argument("--minutes", type=float, default=55.0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.command == "prepare":
        prepare(args.work)
    elif args.command == "train":
        (args.work / "meeting").unlink(missing_ok=True)
        arguments = (args.work, args.minutes, args.lr, args.batch_tokens, args.compile, args.processes)
        torch.multiprocessing.spawn(train, arguments, nprocs=args.processes)
    else:
        export(args.work, args.to, args.note)


if __name__ == "__main__":
    main()
