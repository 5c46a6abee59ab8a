"""Adept's names of tensors and ours, and how tensor parallel ranks share them.

Conversion is renaming alone: the rows of query_key_value are packed per head as q, k, v in both, and both rotate the
first half of a head against the second. Each rank holds whole heads and whole neurons:

    split by rows     embedding, head, query_key_value (weight, bias), dense_h_to_4h (weight, bias)
    split by columns  dense.weight, dense_4h_to_h.weight
    the same in all   every LayerNorm (those of queries and keys excepted, see `merge`), dense.bias, dense_4h_to_h.bias

Source: persimmon-ai-labs/adept-inference, megatron/mpu/layers.py and the modules of megatron/model.
"""

from __future__ import annotations

import re

from persimmon_fast.checkpoint_tensors import EMBEDDING, HEAD

ADEPT_EMBEDDING = "language_model.embedding.word_embeddings.weight"
ADEPT_HEAD = "word_embeddings_for_head.weight"
_ENCODER = "language_model.encoder."
_INV_FREQ = re.compile(r"layers\.\d+\.self_attention\.rotary_emb\.inv_freq$")
# "transformer" and "attention": names of older files that Adept's own loader still takes.
_OLD_ENCODER = re.compile(r"language_model\.transformer\.")
_OLD_ATTENTION = re.compile(r"(language_model\.encoder\.layers\.\d+)\.attention\.")
_BY_ROWS = re.compile(r"(query_key_value|dense_h_to_4h)\.(weight|bias)$")
_BY_COLUMNS = re.compile(r"(self_attn\.dense|dense_4h_to_h)\.weight$")
_QK_NORM = re.compile(r"\.self_attn\.[qk]_layernorm\.(weight|bias)$")


def current_name(adept: str) -> str:
    """Adept's name of a tensor as its code writes it today."""
    return _OLD_ATTENTION.sub(r"\1.self_attention.", _OLD_ENCODER.sub(_ENCODER, adept))


def is_inv_freq(adept: str) -> bool:
    """Whether this is the buffer of rotary frequencies, which the arguments determine."""
    return _INV_FREQ.search(adept) is not None


def to_hugging_face(adept: str) -> str | None:
    """Our name of one of Adept's tensors; None if it belongs to no Persimmon."""
    if adept in (ADEPT_EMBEDDING, ADEPT_HEAD):
        return EMBEDDING if adept == ADEPT_EMBEDDING else HEAD
    if not adept.startswith((_ENCODER + "layers.", _ENCODER + "final_layernorm.")):
        return None
    return "model." + adept.removeprefix(_ENCODER).replace(".self_attention.", ".self_attn.")


def to_adept(ours: str) -> str:
    """Adept's name of one of our tensors."""
    if ours in (EMBEDDING, HEAD):
        return ADEPT_EMBEDDING if ours == EMBEDDING else ADEPT_HEAD
    return _ENCODER + ours.removeprefix("model.").replace(".self_attn.", ".self_attention.")


def nested_keys(adept: str) -> list[str]:
    """The keys of the dicts that hold a tensor: those of modules, then the rest of the name in a flat state_dict."""
    depth = {ADEPT_EMBEDDING: 3, ADEPT_HEAD: 1}.get(adept, 2)
    return adept.split(".", depth)


def split_dim(ours: str) -> int | None:
    """The dimension that tensor parallel ranks share, None: all hold the whole."""
    if ours in (EMBEDDING, HEAD) or _BY_ROWS.search(ours):
        return 0
    return 1 if _BY_COLUMNS.search(ours) else None


def is_qk_norm(ours: str) -> bool:
    return _QK_NORM.search(ours) is not None


def per_head(adept: str, head: int) -> str:
    """The name of one head's part of `...q_layernorm.weight`, where each head of a rank has its own."""
    module, _, parameter = adept.rpartition(".")
    return f"{module}.layernorms.{head}.{parameter}"
