"""Continues texts: python examples/generate.py [FOLDER]

FOLDER: a checkpoint in the layout of transformers, or a name on the Hugging Face Hub; default: the small model that the
package brings, which writes Python.
"""

import sys

from persimmon_fast import SMALL_MODEL, PersimmonForCausalLM, PersimmonTokenizer, TextStreamer

folder = sys.argv[1] if len(sys.argv) > 1 else SMALL_MODEL
model = PersimmonForCausalLM.from_pretrained(folder, dtype="auto")  # .to("cuda") where there is a GPU
tokenizer = PersimmonTokenizer.from_pretrained(folder)

# One text, printed as it is made. The same seed gives the same text, in whatever batch.
prompt = tokenizer("def read_config(path):", return_tensors="pt")
model.generate(
    **prompt, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9, seed=1, streamer=TextStreamer(tokenizer)
)

# Prompts of unequal length in one batch, the most likely tokens, up to the end of a block.
prompts = ["import os\nimport", "class Stack:\n    def __init__(self", "for line in"]
batch = tokenizer(prompts, padding=True, return_tensors="pt")
output = model.generate(
    **batch,
    max_new_tokens=20,
    do_sample=False,
    repetition_penalty=1.15,
    stop_strings="\n\n",
    tokenizer=tokenizer,
    return_dict_in_generate=True,
)
for index, text in enumerate(tokenizer.batch_decode(output.sequences)):
    print(f"---- {prompts[index]!r}\n{text}")
