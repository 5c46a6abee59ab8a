"""A conversation in Adept's format: python examples/chat.py [FOLDER]

Reads from the terminal until an empty line; without a terminal it says two lines of its own. The small model that is
the default writes Python and is no assistant: give the folder of a chat model for real answers.
"""

import sys

from persimmon_fast import SMALL_MODEL, PersimmonForCausalLM, PersimmonTokenizer, TextStreamer

folder = sys.argv[1] if len(sys.argv) > 1 else SMALL_MODEL
model = PersimmonForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = PersimmonTokenizer.from_pretrained(folder)

STOP = "\n\nhuman:"  # else the model goes on and speaks for its user
turns = iter(lambda: input("human: "), "") if sys.stdin.isatty() else ["def add(a, b):", "class Stack:"]
messages = []
for line in turns:
    if not sys.stdin.isatty():
        print(f"human: {line}")
    messages.append({"role": "user", "content": line})
    prompt = tokenizer.apply_chat_template(messages, return_tensors="pt")  # "human: ...\n\nadept: ...\n\nhuman: ..."
    print("adept:", end="")
    tokens = model.generate(
        prompt,
        max_new_tokens=40,
        do_sample=True,
        seed=0,
        stop_strings=STOP,
        tokenizer=tokenizer,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    answer = tokenizer.decode(tokens[0, prompt.shape[1] :]).split(STOP)[0].strip()
    messages.append({"role": "assistant", "content": answer})
print(f"{len(messages)} messages")
