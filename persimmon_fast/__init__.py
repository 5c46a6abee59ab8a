"""Persimmon-8B and Fuyu-8B on handwritten kernels.

    from persimmon_fast import PersimmonForCausalLM, PersimmonTokenizer

Importing the package is cheap: names are loaded when first used, and nothing here starts CUDA.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon_fast.version import __version__

if TYPE_CHECKING:
    from persimmon_fast.checkpoint import CheckpointError
    from persimmon_fast.classification import PersimmonForSequenceClassification, PersimmonForTokenClassification
    from persimmon_fast.config import PersimmonConfig
    from persimmon_fast.fuyu import FuyuForCausalLM
    from persimmon_fast.fuyu_config import FuyuConfig
    from persimmon_fast.generation import GenerateOutput
    from persimmon_fast.generation_config import GenerationConfig
    from persimmon_fast.hub import HubError
    from persimmon_fast.integrations.transformers import apply_persimmon_fast, revert
    from persimmon_fast.kv_cache import PagedKVCache
    from persimmon_fast.model import PersimmonForCausalLM, PersimmonModel
    from persimmon_fast.pretrained import PersimmonPreTrainedModel
    from persimmon_fast.tokenizer import PersimmonTokenizer, TextStreamer

SMALL_MODEL = Path(__file__).parent / "assets" / "persimmon-small"
"""Folder of the small model that the package brings, trained on Python's standard library."""

_HOME = {
    "apply_persimmon_fast": "integrations.transformers",
    "CheckpointError": "checkpoint",
    "FuyuConfig": "fuyu_config",
    "FuyuForCausalLM": "fuyu",
    "GenerateOutput": "generation",
    "GenerationConfig": "generation_config",
    "HubError": "hub",
    "PagedKVCache": "kv_cache",
    "PersimmonConfig": "config",
    "PersimmonForCausalLM": "model",
    "PersimmonForSequenceClassification": "classification",
    "PersimmonForTokenClassification": "classification",
    "PersimmonModel": "model",
    "PersimmonPreTrainedModel": "pretrained",
    "PersimmonTokenizer": "tokenizer",
    "TextStreamer": "tokenizer",
    "revert": "integrations.transformers",
}

__all__ = [
    "SMALL_MODEL",
    "CheckpointError",
    "FuyuConfig",
    "FuyuForCausalLM",
    "GenerateOutput",
    "GenerationConfig",
    "HubError",
    "PagedKVCache",
    "PersimmonConfig",
    "PersimmonForCausalLM",
    "PersimmonForSequenceClassification",
    "PersimmonForTokenClassification",
    "PersimmonModel",
    "PersimmonPreTrainedModel",
    "PersimmonTokenizer",
    "TextStreamer",
    "__version__",
    "apply_persimmon_fast",
    "revert",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'persimmon_fast' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"persimmon_fast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
