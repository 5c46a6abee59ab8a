"""Trains on a text, with an ordinary torch loop: python examples/fine_tune.py [FOLDER]

The text is this file. Training runs the differentiable definition of each op in torch (warnings say so); what is
generated afterwards runs the kernels again, on the new weights.
"""

import sys
from pathlib import Path

import torch

from persimmon_fast import SMALL_MODEL, PersimmonForCausalLM, PersimmonTokenizer

folder = sys.argv[1] if len(sys.argv) > 1 else SMALL_MODEL
model = PersimmonForCausalLM.from_pretrained(folder, dtype="float32")
tokenizer = PersimmonTokenizer.from_pretrained(folder)
ids = tokenizer(Path(__file__).read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :512]


def continuation() -> str:
    start = ids[:, :12]
    tokens = model.generate(start, max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
    return repr(tokenizer.decode(tokens[0]))


print("before:", continuation())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
model.train()
for step in range(12):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f} nats per token")
model.eval()
print("after:", continuation())
