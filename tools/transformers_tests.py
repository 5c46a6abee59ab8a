"""Runs transformers' own tests of Persimmon on our classes, and prints what became of each.

    python tools/transformers_tests.py ~/transformers        # a checkout of transformers 5.23

The tests make configs of transformers and change them in place: a class of ours that gets one takes a copy. They name
hidden_act "gelu", which Persimmon never had: the copy says "relu2". docs/transformers_tests.md has the table.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers.models.persimmon import modeling_persimmon

import persimmon_fast
from persimmon_fast import classification, model

HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")


def our_config(config: Any) -> persimmon_fast.PersimmonConfig:
    ours = persimmon_fast.PersimmonConfig
    return config if isinstance(config, ours) else ours.from_dict(config.to_dict() | {"hidden_act": "relu2"})


class Adapted:
    """What the tests ask of a class beside its own behaviour, before the class of ours in the bases."""

    config_class = transformers.PersimmonConfig
    base_model_prefix, main_input_name, supports_gradient_checkpointing = "model", "input_ids", True
    _keys_to_ignore_on_load_missing, _keep_in_fp32_modules, _keep_in_fp32_modules_strict = None, (), ()
    _supports_sdpa = False  # there is one attention, not several to be compared
    vocab_size = property(lambda self: self.config.vocab_size)
    is_activation_checkpointing = property(lambda self: self.base_model.gradient_checkpointing)

    def __init__(self, config: Any) -> None:
        super().__init__(our_config(config))

    _from_config = classmethod(lambda cls, config, **_: cls(config))
    _can_set_attn_implementation = _can_set_experts_implementation = classmethod(lambda cls: False)
    can_generate = classmethod(lambda cls: hasattr(cls, "generate"))
    init_weights = lambda self: self._init_weights()  # noqa: E731
    activation_checkpointing_enable = lambda self, **_: self.gradient_checkpointing_enable()  # noqa: E731
    activation_checkpointing_disable = lambda self: self.gradient_checkpointing_disable()  # noqa: E731

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        super().save_pretrained(folder, **options, overwrite=True)  # theirs never asks

    @classmethod
    def from_pretrained(cls, folder: Any, output_loading_info: bool = False, **options: Any) -> Any:
        options.pop("ignore_mismatched_sizes", None)  # never: what does not fit is an error
        with warnings.catch_warnings(record=True) as caught:
            model = super().from_pretrained(folder, **options)
        if not output_loading_info:
            return model
        missing = {name for name in cls._heads(model.config) if any(name in str(w.message) for w in caught)}
        return model, {"missing_keys": missing, "unexpected_keys": set(), "mismatched_keys": set()}

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().resize_token_embeddings(*arguments, **options)
        except ValueError as error:  # the tests know it by its words
            found = str(error).partition("got ")[2]
            theirs = f"Asking to pad the embedding matrix to a multiple of `{found}`, which is not and integer. "
            raise ValueError(theirs + "Please make sure to pass an integer") from error


class Outcomes:
    """pytest plugin: what became of each test, with the first line of its failure."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        if report.skipped:
            reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else ""
        else:
            lines = [line[2:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
            reason = lines[0] if lines else ""
        name = report.nodeid.split("::")[-1]
        if self.of.get(name, ("",))[0] != "failed":  # a part of the test, a subTest, may have
            self.of[name] = (report.outcome, reason.removeprefix("Skipped: "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, such as -- -k save_load")
    options = parser.parse_args()
    for name in (f"Persimmon{head}" for head in HEADS):
        base = getattr(persimmon_fast, name)
        ours = type(name, (Adapted, base), {"__module__": base.__module__})
        for module in (transformers, modeling_persimmon, model, classification):
            setattr(module, name, ours)
    modeling_persimmon.PersimmonRotaryEmbedding = None  # ours is no module: a test of theirs must not pass for ours
    sys.path.insert(0, str(options.checkout))
    outcomes = Outcomes()
    tests = options.checkout / "tests/models/persimmon/test_modeling_persimmon.py"
    pytest.main(
        [str(tests), "-q", "-p", "no:cacheprovider", f"--rootdir={options.checkout}", *options.pytest], [outcomes]
    )
    for name, (outcome, reason) in sorted(outcomes.of.items()):
        print(f"{outcome:8} {name:70} {reason[:160]}")


if __name__ == "__main__":
    main()
