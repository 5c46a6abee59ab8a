"""Adept's original checkpoints, there and back: python examples/convert.py [CHECKPOINT]

CHECKPOINT: Adept's release tar, the folder in it, or one model_optim_rng.pt; three copies go into the temporary folder.
Without one, the small model that the package brings is written as such a checkpoint first. On the command line:
persimmon-fast convert IN OUT
"""

import hashlib
import sys
import tempfile
from pathlib import Path

from persimmon_fast import SMALL_MODEL, PersimmonForCausalLM
from persimmon_fast.adept import to_adept, to_hugging_face


def digest(folder: Path) -> str:
    """Of all parameters of a model, names and bits."""
    model = PersimmonForCausalLM.from_pretrained(folder, dtype="auto")
    result = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        result.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
    return result.hexdigest()[:16]


with tempfile.TemporaryDirectory() as temporary:
    work = Path(temporary)
    if len(sys.argv) > 1:
        checkpoint = Path(sys.argv[1])
    else:
        checkpoint = to_adept(SMALL_MODEL, work / "adept", num_ranks=2, progress=False).target
    print("Adept's files:", *sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.*")), sep="\n  ")

    there = to_hugging_face(checkpoint, work / "hf", progress=False)
    files = sorted(path.name for path in there.target.iterdir())
    print(f"{there.num_ranks} tensor parallel ranks, {there.num_bytes:,} bytes of weights ->", *files)

    back = to_adept(there.target, work / "adept again", progress=False)
    again = to_hugging_face(back.target, work / "hf again", progress=False)
    print("there:", digest(there.target), "and back again:", digest(again.target))
    if len(sys.argv) == 1:
        print("same bits as the original:", digest(again.target) == digest(SMALL_MODEL))
