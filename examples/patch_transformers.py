"""The one line for a model of transformers: python examples/patch_transformers.py [FOLDER]"""

import sys

import torch
from transformers import AutoModelForCausalLM, pipeline

from persimmon_fast import SMALL_MODEL, PersimmonTokenizer, apply_persimmon_fast, revert
from persimmon_fast.integrations.tokenizer import to_transformers

folder = sys.argv[1] if len(sys.argv) > 1 else SMALL_MODEL
model = AutoModelForCausalLM.from_pretrained(folder).float()  # fp32: greedy tokens can be compared
tokenizer = to_transformers(PersimmonTokenizer.from_pretrained(folder))  # the ids that the model was trained on
inputs = tokenizer("def read_config(path):", return_tensors="pt")
settings = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.15}

before = model.generate(**inputs, **settings)
apply_persimmon_fast(model)  # the one line
after = model.generate(**inputs, **settings)
print("same tokens:", torch.equal(before, after))

# Everything of transformers works as before: pipelines, trainers, adapters, saving.
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generator("class Stack:", **settings)[0]["generated_text"])

with torch.no_grad():
    patched = model(**inputs).logits
    revert(model)
    print("largest difference of a logit:", float((model(**inputs).logits - patched).abs().max()))
