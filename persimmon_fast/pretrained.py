"""What every Persimmon class shares: loading, saving, its embeddings, and the facts of its parameters."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from persimmon_fast.checkpoint import load_checkpoint, save_checkpoint
from persimmon_fast.checkpoint_tensors import ModelConfig, text_tensors
from persimmon_fast.config import PersimmonConfig
from persimmon_fast.fuyu_config import read_config
from persimmon_fast.generation import GenerationMixin
from persimmon_fast.generation_config import GenerationConfig
from persimmon_fast.hub import model_folder
from persimmon_fast.outputs import ModelOutput
from persimmon_fast.vocabulary_size import resize_token_embeddings

if TYPE_CHECKING:
    from typing_extensions import Self

    from persimmon_fast.model import PersimmonModel

_OUTPUT_OPTIONS = ("output_attentions", "output_hidden_states", "return_dict")  # that a config may name, in `extra`
_WHOLE_MODEL = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that let accelerate choose

Output = TypeVar("Output", bound=ModelOutput)


class PersimmonPreTrainedModel(nn.Module):
    """Loading, saving and the facts that every Persimmon class shares.

    `config` is immutable: a change makes a new one. transformers' Trainer writes to the config of a model that has one;
    give it a module that calls this one.
    """

    config: PersimmonConfig
    has_lm_head: ClassVar[bool] = True
    gradient_checkpointing: bool = False

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        config: PersimmonConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        check_finite: bool = False,
        progress: bool = True,
        **config_changes: Any,
    ) -> Self:
        """Loads a checkpoint in the layout of transformers.

        A class with a classification head also loads a checkpoint that has none, or another class's: its head is then
        new, which a warning says.

        Args:
            folder: holds config.json and model.safetensors, its shards, or pytorch_model*.bin; or a name on the Hugging
                Face Hub, such as "adept/persimmon-8b-base". Of a Fuyu checkpoint, the classes of Persimmon take the
                language model.
            config: instead of the folder's.
            dtype: a torch.dtype or its name ("bfloat16"); "auto" or None: the dtype that config.json names, else
                the stored one. Weights that need no conversion stay memory-mapped. torch_dtype: its old name.
            device: where the weights go; None: the CPU. device_map: the same as transformers names it: a device,
                {"": device}, or "auto", the current CUDA device if there is one. A model lies on one device.
            revision, cache_dir, token, local_files_only: of a name on the Hub, as in `hub.folder_of`.
            check_finite: also look for NaN and inf in the weights (reads all of them once).
            progress: a bar on a terminal when loading takes long.
            config_changes: fields of the config with other values, such as num_labels.
        Raises:
            CheckpointError, ValueError: naming file, key, what was expected and what was found.
            HubError: a name on the Hub could not be downloaded.
        """
        folder = model_folder(
            folder, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
        stored = config or read_config(folder)
        own = cls._config_from(stored)
        config = _changed(own, config_changes)
        heads = cls._heads(config)
        tensors = load_checkpoint(
            folder,
            config if own is stored else stored,
            dtype=_one_of("torch_dtype", torch_dtype, "dtype", dtype) or "auto",
            device=_device(device, device_map),
            check_finite=check_finite,
            progress=progress,
            heads=heads,
            lm_head=cls.has_lm_head,
        )
        if own is not stored:
            tensors = text_tensors(stored, tensors)
        new = [name for name in heads if name not in tensors]
        if new:
            tensors |= _new_heads({name: heads[name] for name in new}, config, next(iter(tensors.values())))
            warnings.warn(f"{folder} has no {', '.join(new)}: random now, to be trained", stacklevel=2)
        with torch.device("meta"):
            model = cls(config)
        cls._load(model, tensors)
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                module.generation_config = GenerationConfig.from_pretrained(folder, module.config)
        return model.eval()

    @classmethod
    def _config_from(cls, stored: ModelConfig) -> Any:
        """The config of this class in a checkpoint: the language model's, also where that is a part of Fuyu."""
        return stored.get_text_config()

    @classmethod
    def _heads(cls, config: PersimmonConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that this class has beside the decoder and `lm_head`, by name."""
        return {}

    @staticmethod
    def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
        model.load_state_dict(tensors, strict=True, assign=True)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", overwrite: bool = False
    ) -> None:
        """Writes config.json, the weights and generation_config.json, in the layout of transformers. The folder is at
        every moment the old one or the new one; `overwrite`: whether it may hold a checkpoint already."""
        save_checkpoint(
            folder,
            self._config_to_save(),
            self._tensors_to_save(),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            heads=self._heads(self.config),
            lm_head=self.has_lm_head,
        )
        for module in self.modules():
            if isinstance(module, GenerationMixin):
                module.generation_config.save_pretrained(folder)

    def _config_to_save(self) -> ModelConfig:
        """With the name of this class."""
        extra = {key: value for key, value in self.config.extra.items() if key != "architectures"}
        if not self.has_lm_head:  # the config itself names the language model
            extra["architectures"] = [type(self).__name__]
        return self.config.replace(extra=extra)

    def _tensors_to_save(self) -> dict[str, Tensor]:
        """By their names in a checkpoint."""
        return self.state_dict()

    # ---- parameters ----

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Elements of the parameters, tied ones once; without those that need no gradient, without the embedding
        (and a head that is tied to it)."""
        embedding = self.get_input_embeddings().weight
        counted = (p for p in self.parameters() if not (exclude_embeddings and p is embedding))
        return sum(p.numel() for p in counted if p.requires_grad or not only_trainable)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    # ---- embeddings ----

    @property
    def base_model(self) -> PersimmonModel:
        """The decoder without a head."""
        return cast("PersimmonModel", getattr(self, "model", self))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Takes another embedding, as it is; a tied head follows. For another size: `resize_token_embeddings`."""
        self.base_model.embed_tokens = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language model's head; None where there is none."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Takes another head, as it is."""
        if self.get_output_embeddings() is None:
            raise ValueError(f"set_output_embeddings: {type(self).__name__} has no language model head")
        self.lm_head = value

    def tie_weights(self) -> None:
        """Makes the head the embedding, if config.tie_word_embeddings says so."""
        head = self.get_output_embeddings()
        if head is not None and self.config.get_text_config().tie_word_embeddings:
            head.weight = self.get_input_embeddings().weight

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Another vocabulary size, in place: rows at the end of the embedding and of the head go or are added. See
        `vocabulary_size.resize_token_embeddings`, also for the arguments."""
        return resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    # ---- training ----

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Training keeps the input of each layer alone and computes the layer again for its gradients. The keywords
        are taken for transformers' sake: checkpointing is never reentrant here."""
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, PersimmonPreTrainedModel):
                module.gradient_checkpointing = value

    # ---- outputs ----

    def _option(self, name: str, given: Any) -> Any:
        """What the caller gave, else what the config says, else None."""
        return self.config.extra.get(name) if given is None else given

    def _returned(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        return output.to_tuple() if self._option("return_dict", return_dict) is False else output


def _changed(config: PersimmonConfig, changes: dict[str, Any]) -> PersimmonConfig:
    fields = {field.name for field in dataclasses.fields(config)}
    unknown = sorted(changes.keys() - fields - set(_OUTPUT_OPTIONS))
    if unknown:
        raise TypeError(f"from_pretrained: unknown argument {', '.join(unknown)}: no field of {type(config).__name__}")
    options = {name: changes.pop(name) for name in _OUTPUT_OPTIONS if name in changes}
    if options:
        changes["extra"] = {**config.extra, **changes.get("extra", {}), **options}
    return config.replace(**changes) if changes else config


def _new_heads(shapes: Mapping[str, tuple[int, ...]], config: PersimmonConfig, like: Tensor) -> dict[str, Tensor]:
    return {
        name: torch.zeros(shape, dtype=like.dtype, device=like.device)
        if name.endswith(".bias")
        else torch.empty(shape, dtype=like.dtype, device=like.device).normal_(std=config.initializer_range)
        for name, shape in shapes.items()
    }


def _one_of(old_name: str, old: Any, name: str, value: Any) -> Any:
    """The value of an argument that has two names."""
    if old is not None and value is not None and old != value:
        raise ValueError(f"from_pretrained: {old_name}={old!r} and {name}={value!r} are the same argument: give one")
    return old if value is None else value


def _device(device: torch.device | str | None, device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise ValueError(f"from_pretrained: device_map must be one device, such as {{'': 0}}, got {device_map!r}")
        device_map = device_map[""]
    if device_map in _WHOLE_MODEL:
        device_map = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, int):
        device_map = f"cuda:{device_map}"
    places = [None if place is None else torch.device(place) for place in (device_map, device)]
    return torch.device(_one_of("device_map", places[0], "device", places[1]) or "cpu")
