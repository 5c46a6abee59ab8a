"""llama.cpp, which has no Persimmon any more, on a model that costs the same: its Nemotron architecture has LayerNorm
with a bias, partial rotary and squared ReLU too, so with our sizes it reads matrices of our shapes, biases included (no
qk-layernorm; queries, keys and values are three products). Its numbers are our model's, its results mean nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.modes import Mode, Past, UnavailableError
from persimmon_fast import PersimmonForCausalLM

_PREFILL_BATCH = 512  # tokens
MAX_CONTEXT = 4096  # it must compute its past, at about a hundred tokens a second on two cores


class LlamaCppMode(Mode):
    """One sequence through llama-cpp-python, with as many threads as torch has.

    Raises:
        UnavailableError: llama-cpp-python, or gguf, which writes the model, is not installed.
    """

    cache_kind = "llama.cpp"
    is_same_model = False
    in_prefill = in_generate = False

    def __init__(self, model: PersimmonForCausalLM) -> None:
        for package, distribution in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
            try:
                __import__(package)
            except ModuleNotFoundError as error:
                if error.name != package:
                    raise
                raise UnavailableError(f"{distribution} is not installed") from None
        import llama_cpp  # type: ignore[import-not-found]

        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        self._folder = tempfile.TemporaryDirectory(prefix="persimmon-fast-llama-")
        self._path = Path(self._folder.name) / "model.gguf"
        _write_model(model, self._path)
        self._on_gpu = model.device.type == "cuda"
        self._llama: Any = None
        self._context = 0

    def take_over(self, past: Past, other: Mode | None) -> None:
        import llama_cpp

        self._context = past.context
        self._llama = llama_cpp.Llama(
            str(self._path),
            n_ctx=past.max_cache_len,
            n_batch=_PREFILL_BATCH,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            n_gpu_layers=-1 if self._on_gpu else 0,
            verbose=False,
        )
        generator = torch.Generator().manual_seed(3)
        self._llama.eval(torch.randint(self._llama.n_vocab(), (past.context,), generator=generator).tolist())

    def rewind(self) -> None:
        self._llama.n_tokens = self._context  # `eval` forgets what lies behind

    def decode(self, tokens: Tensor) -> list[list[int]]:
        import llama_cpp
        import numpy as np

        chosen = []
        for token in tokens.flatten().tolist():
            self._llama.eval([token])
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._llama.ctx), (self._llama.n_vocab(),))
            chosen.append([int(logits.argmax())])
        return chosen

    def drop_cache(self) -> None:
        self._llama.close()
        self._llama = None


def _write_model(model: PersimmonForCausalLM, path: Path) -> None:
    """Our weights under the names of GGUF."""
    import gguf  # type: ignore[import-not-found]

    config = model.config
    writer = gguf.GGUFWriter(str(path), "nemotron")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }

    def add(name: str, tensor: Tensor) -> None:
        if tensor.dim() == 1:  # it wants these in fp32
            writer.add_tensor(name, tensor.detach().float().cpu().numpy())
            return
        as_bytes = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
        writer.add_tensor(name, as_bytes, raw_dtype=types[tensor.dtype])

    backbone = model.model
    add("token_embd.weight", backbone.embed_tokens.weight)
    layers: Any = backbone.layers
    for index, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        heads = (config.num_attention_heads, 3, config.head_dim)
        for kind in ("weight", "bias"):
            packed = getattr(attention.query_key_value, kind).unflatten(0, heads)
            for part, name in enumerate(("attn_q", "attn_k", "attn_v")):
                add(f"blk.{index}.{name}.{kind}", packed[:, part].flatten(0, 1))
        for module, name in (
            (layer.input_layernorm, "attn_norm"),
            (attention.dense, "attn_output"),
            (layer.post_attention_layernorm, "ffn_norm"),
            (mlp.dense_h_to_4h, "ffn_up"),
            (mlp.dense_4h_to_h, "ffn_down"),
        ):
            add(f"blk.{index}.{name}.weight", module.weight)
            add(f"blk.{index}.{name}.bias", module.bias)
    for kind in ("weight", "bias"):
        add(f"output_norm.{kind}", getattr(backbone.final_layernorm, kind))
    add("output.weight", model.lm_head.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
