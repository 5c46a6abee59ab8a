"""The small Persimmon in plain PyTorch: hyper-parameters, model, and what is measured of it.

Parameter names and numerics are those of transformers' PersimmonForCausalLM. Shorthand in shapes: batch, seqlen.
"""

import math

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, HEADS, LAYERS, INTERMEDIATE, VOCAB, POSITIONS = 256, 4, 4, 1024, 4096, 1024
HEAD_DIM, ROTARY_DIM, THETA, EPS = 64, 32, 25000.0, 1e-5
BOS, EOS = 1, 2
CONFIG = {
    "architectures": ["PersimmonForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "dtype": "bfloat16",
    "eos_token_id": EOS,
    "hidden_act": "relu2",
    "hidden_dropout": 0.0,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "layer_norm_eps": EPS,
    "max_position_embeddings": POSITIONS,
    "model_type": "persimmon",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": None,
    "qk_layernorm": True,
    "rope_parameters": {"partial_rotary_factor": ROTARY_DIM / HEAD_DIM, "rope_theta": THETA, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB,
}
GENERATION = {
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "repetition_penalty": 1.05,
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.q_layernorm = nn.LayerNorm(HEAD_DIM, EPS)
        self.k_layernorm = nn.LayerNorm(HEAD_DIM, EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x: [batch, seqlen, HIDDEN]
        qkv = self.query_key_value(x).view(*x.shape[:2], HEADS, 3, HEAD_DIM)
        q, k, v = (t.squeeze(3).transpose(1, 2) for t in qkv.split(1, dim=3))  # [batch, HEADS, seqlen, HEAD_DIM]
        q = rotate(self.q_layernorm(q), cos, sin).to(v.dtype)
        k = rotate(self.k_layernorm(k), cos, sin).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(out.transpose(1, 2).reshape(x.shape))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + ROTARY_DIM / 2) of the first ROTARY_DIM dims; the others pass."""
    turned, passed = x.split((ROTARY_DIM, HEAD_DIM - ROTARY_DIM), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, passed), -1)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(HIDDEN, INTERMEDIATE)
        self.dense_4h_to_h = nn.Linear(INTERMEDIATE, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.relu(self.dense_h_to_4h(x)).square())


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN, EPS)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN, EPS)
        self.mlp = MLP()

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin)
        return h + self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.final_layernorm = nn.LayerNorm(HIDDEN, EPS)


class Persimmon(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        inv_freq = THETA ** (-torch.arange(0, ROTARY_DIM, 2) / ROTARY_DIM)
        angles = torch.outer(torch.arange(POSITIONS), inv_freq).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual = name.endswith(("dense.weight", "dense_4h_to_h.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * LAYERS) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, input_ids: Tensor) -> Tensor:  # [batch, seqlen] -> logits [batch, seqlen, VOCAB]
        h = self.model.embed_tokens(input_ids)
        cos, sin = self.cos[: input_ids.shape[1]], self.sin[: input_ids.shape[1]]
        for layer in self.model.layers:
            h = layer(h, cos, sin)
        return self.lm_head(self.model.final_layernorm(h))

    def loss(self, window: Tensor) -> Tensor:
        """Mean nats per token of a [batch, seqlen + 1] window of ids."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.lm_head.weight.dtype == torch.float32):
            logits = self(window[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


# ---------------------------------------------------------------- measurements


@torch.no_grad()
def held_out_loss(model: Persimmon, tokens: np.ndarray, seqlen: int = 512, limit: int | None = None) -> float:
    """Mean nats per token over consecutive windows of `seqlen`, each read without the one before it."""
    count = (len(tokens) - 1) // seqlen
    rows = [tokens[i * seqlen : (i + 1) * seqlen + 1].astype(np.int64) for i in range(count)]
    if limit is not None:
        rows = rows[:: max(1, count // limit)]
    batches = torch.from_numpy(np.stack(rows)).split(16)
    return sum(model.loss(batch).item() * len(batch) for batch in batches) / len(rows)


@torch.no_grad()
def zero_shares(model: Persimmon, tokens: np.ndarray) -> list[float]:
    """Share of exact zeros after relu^2 in each layer, over windows spread through the held-out text."""
    shares: list[list[float]] = [[] for _ in range(LAYERS)]
    hooks = [
        layer.mlp.dense_4h_to_h.register_forward_pre_hook(
            lambda _, inputs, to=to: to.append((inputs[0] == 0).float().mean().item())
        )
        for layer, to in zip(model.model.layers, shares, strict=True)
    ]
    held_out_loss(model, tokens, limit=64)
    for hook in hooks:
        hook.remove()
    return [sum(share) / len(share) for share in shares]


@torch.no_grad()
def sample(model: Persimmon, sp: spm.SentencePieceProcessor, prompt: str, count: int, seed: int) -> str:
    """`prompt` and up to `count` more tokens at the settings of GENERATION."""
    generator = torch.Generator().manual_seed(seed)
    ids = [BOS, *sp.encode(prompt)]
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0, -1]
        seen = torch.tensor(sorted(set(ids)))  # repetition penalty as in Keskar et al. 2019, arXiv:1909.05858
        penalty = GENERATION["repetition_penalty"]
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        probabilities = (logits / GENERATION["temperature"]).softmax(-1)
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered > GENERATION["top_p"]] = 0
        ids.append(order[torch.multinomial(ordered, 1, generator=generator)].item())
        if ids[-1] == EOS:
            break
    return sp.decode(ids)
