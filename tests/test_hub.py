"""Names on the Hugging Face Hub, with a huggingface_hub of our own: no test asks the network."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_config
from processes import environment

from persimmon_fast import HubError, PersimmonConfig, PersimmonForCausalLM, PersimmonTokenizer, hub
from persimmon_fast.config import ConfigError

NAME = "adept/persimmon-tiny"


class FakeHub:
    """`snapshot_download` of a folder of files, into a cache; `error`: raised instead."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.files, self.error, self.calls = cache, {}, None, []

    def snapshot_download(self, repo_id, *, allow_patterns, **options):
        self.calls.append((repo_id, allow_patterns, options))
        if self.error is not None:
            raise self.error
        self.cache.mkdir(exist_ok=True)
        for name, content in self.files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).write_bytes(content)
        return str(self.cache)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def saved_files(folder, model):
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_model_and_config_from_a_name(fake, tmp_path, form):
    import torch

    model = PersimmonForCausalLM(tiny_config(eos_token_id=7))
    fake.files = saved_files(tmp_path / "made", model) | {"README.md": b"", "optimizer.pt": b"", "tf_model.h5": b""}
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    if form == "pytorch_model.bin":
        del fake.files["model.safetensors"]
    fake.files["pytorch_model.bin"] = (tmp_path / "pytorch_model.bin").read_bytes()
    options = {"revision": "v2", "cache_dir": tmp_path / "elsewhere", "token": "secret", "local_files_only": True}
    loaded = PersimmonForCausalLM.from_pretrained(NAME, **options)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.generation_config.eos_token_id == 7
    assert {path.name for path in fake.cache.iterdir()} == {"config.json", "generation_config.json", form}
    for repository, _, given in fake.calls:
        assert repository == NAME
        assert given == options | {"cache_dir": str(tmp_path / "elsewhere")}
    assert PersimmonConfig.from_pretrained(NAME, revision="v2") == loaded.config
    assert fake.calls[-1][1] == ["config.json"]
    assert fake.calls[-1][2]["revision"] == "v2"


def test_tokenizer_from_a_name(fake):
    from persimmon_fast import SMALL_MODEL

    fake.files = {path.name: path.read_bytes() for path in SMALL_MODEL.iterdir() if path.is_file()}
    tokenizer = PersimmonTokenizer.from_pretrained(NAME, revision="v2", add_bos=False)
    assert tokenizer.encode("def") == PersimmonTokenizer.from_pretrained(SMALL_MODEL, add_bos=False).encode("def")
    assert not any(path.suffix == ".safetensors" for path in fake.cache.iterdir())
    assert fake.calls[0][2]["revision"] == "v2"


def test_a_folder_that_exists_wins(fake, tmp_path):
    model = PersimmonForCausalLM(tiny_config())
    saved_files(tmp_path / NAME, model)
    PersimmonForCausalLM.from_pretrained(NAME)
    PersimmonConfig.from_pretrained(NAME)
    assert fake.calls == []


@pytest.mark.parametrize(
    "name", [Path(NAME), "persimmon-tiny", "a/b/c", "../models/persimmon", "/none/here", "~/x", "a/"]
)
def test_what_is_no_name_is_not_asked_for(fake, name):
    with pytest.raises(ConfigError, match="nothing there"):
        PersimmonConfig.from_pretrained(name)
    assert hub.model_folder(name) == str(name)
    assert fake.calls == []


class RepositoryNotFoundError(Exception):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(Exception):
    pass


class OfflineModeIsEnabled(ConnectionError):  # noqa: N818  huggingface_hub's name
    pass


@pytest.mark.parametrize(
    ("error", "problem", "remedy"),
    [
        (
            RepositoryNotFoundError("404"),
            "there is no such model, or it is private",
            "Check the name; .*`hf auth login`",
        ),
        (
            GatedRepoError("403"),
            "access is granted on request",
            "Ask for it on https://huggingface.co/adept/persimmon-tiny",
        ),
        (RevisionNotFoundError("404"), "it has no revision 'v9'", "Choose one that https://.*/tree/main lists"),
        (
            LocalEntryNotFoundError("no"),
            "not in the cache, and there is no connection",
            r"HF_HUB_OFFLINE.*`hf download",
        ),
        (OfflineModeIsEnabled("no"), "not in the cache, and there is no connection", r"HF_HUB_OFFLINE.*`hf download"),
        (ValueError("odd\nlong"), "ValueError: odd\\.", f"`hf download {NAME} --local-dir persimmon-tiny` and give"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_say_what_to_do(fake, error, problem, remedy):
    fake.error = error
    with pytest.raises(HubError, match=f"^{NAME}: no such folder here, and .* Hub: .*{problem}.*{remedy}") as caught:
        PersimmonForCausalLM.from_pretrained(NAME, revision="v9")
    assert caught.value.name == NAME
    assert caught.value.__cause__ is error


def test_huggingface_hub_is_not_installed(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"huggingface_hub, which would download it, is not installed.*`pip install"):
        PersimmonForCausalLM.from_pretrained(NAME)


def test_a_name_without_weights(fake, tmp_path):
    fake.files = {"config.json": tiny_config().to_json_string().encode(), "model.gguf": b""}
    with pytest.raises(HubError, match=r"found neither model\*.safetensors nor pytorch_model\*.bin"):
        PersimmonForCausalLM.from_pretrained(NAME)


def test_the_cache_of_the_real_huggingface_hub(tmp_path, monkeypatch):
    """Its layout of a cache, filled by hand: found without a connection, by name and by revision."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--adept--persimmon-tiny"
    model = PersimmonForCausalLM(tiny_config())
    saved_files(repository / "snapshots" / commit, model)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for revision in (None, "main", commit):
        loaded = PersimmonForCausalLM.from_pretrained(NAME, revision=revision, **options)
        assert loaded.num_parameters() == model.num_parameters()
    with pytest.raises(HubError, match="it is not in the cache, and there is no connection"):
        PersimmonForCausalLM.from_pretrained(NAME, revision="v2", **options)


def test_importing_the_package_imports_neither_hub_nor_transformers(tmp_path):
    code = (
        "import sys, persimmon_fast; "
        "names = set(persimmon_fast.__all__) - {'apply_persimmon_fast', 'revert'}; "  # which patch transformers
        "[getattr(persimmon_fast, name) for name in names]; "
        "print(sorted({'huggingface_hub', 'transformers'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment())
    assert result.stdout.strip() == "[]"
