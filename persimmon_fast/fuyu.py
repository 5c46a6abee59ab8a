"""Fuyu: Persimmon with image patches among its tokens.

There is no image encoder. An image is cut into patches, one Linear makes an embedding of each, and these take the
places of the embeddings of the placeholder tokens; from there on it is `PersimmonForCausalLM`, whose key/value cache,
kernels and `generate` serve unchanged. Module and parameter names are those that transformers writes to checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from persimmon_fast.checkpoint_tensors import ModelConfig, text_tensors
from persimmon_fast.config_file import ConfigError
from persimmon_fast.fuyu_config import FuyuConfig
from persimmon_fast.kv_cache import PagedKVCache
from persimmon_fast.model import PersimmonForCausalLM, PersimmonModel
from persimmon_fast.pretrained import PersimmonPreTrainedModel

if TYPE_CHECKING:
    from persimmon_fast.generation import GenerateOutput
    from persimmon_fast.generation_config import GenerationConfig
    from persimmon_fast.outputs import CausalLMOutputWithPast

# One entry per sample: the patches of its images, or None. Or a tensor of all patches in order.
Patches = Tensor | Sequence["Tensor | Sequence[Tensor] | None"]


class FuyuForCausalLM(PersimmonPreTrainedModel):
    """Text from images and text. Takes what transformers' FuyuProcessor gives, of releases 4 and 5."""

    config: FuyuConfig  # type: ignore[assignment]

    def __init__(self, config: FuyuConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = PersimmonForCausalLM(config.text_config)
        self.vision_embed_tokens = nn.Linear(config.patch_elements, config.text_config.hidden_size)
        nn.init.normal_(self.vision_embed_tokens.weight, std=config.text_config.initializer_range)
        nn.init.zeros_(self.vision_embed_tokens.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        image_patches: Patches | None = None,
        *,
        pixel_values: Patches | None = None,
        image_patches_indices: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: PagedKVCache | None = None,
        **arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if labels are given.

        Args:
            input_ids: [batch_size, seqlen] int64, with config.image_token_id where a patch belongs.
            image_patches: patches of patch_size^2 * num_channels values, given with the tokens that hold their
                placeholders and not again with later ones. A tensor: all patches in the order of their placeholders,
                [num_patches, values], or [batch_size, num_patches, values]; or a list with one entry per sample:
                [num_patches, values], [num_images, num_patches, values], a list of such tensors, or None.
            pixel_values: another name of image_patches.
            image_patches_indices: [batch_size, >= seqlen] int64: which of the sample's patches a token takes, -1: none.
                Columns past seqlen must be -1. None: the placeholders take them in order.
            inputs_embeds: [batch_size, seqlen, hidden_size] instead of input_ids. A placeholder is then what equals the
                embedding of config.image_token_id, if image_patches_indices does not say it.
            arguments: as of `PersimmonForCausalLM.forward`: attention_mask, labels, ...
        Raises:
            ValueError: naming the argument, and the sample whose patches do not fit its placeholders.
        """
        image_patches = _one_of(image_patches, pixel_values)
        past = past_key_values.num_columns if isinstance(past_key_values, PagedKVCache) else 0
        embeds = self._embed(input_ids, inputs_embeds, image_patches, image_patches_indices, past)
        return self.language_model(past_key_values=past_key_values, inputs_embeds=embeds, **arguments)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image_patches: Patches | None = None,
        pixel_values: Patches | None = None,
        image_patches_indices: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **settings: Any,
    ) -> Tensor | GenerateOutput:
        """Continues each prompt. Images as in `forward`; the rest, and what is returned, as in
        `PersimmonForCausalLM.generate`. A penalty on repetition counts the placeholder as a token that occurred."""
        image_patches = _one_of(image_patches, pixel_values)
        embeds = self._embed(input_ids, inputs_embeds, image_patches, image_patches_indices, past=0)
        return self.language_model.generate(input_ids, attention_mask, inputs_embeds=embeds, **settings)

    @property
    def generation_config(self) -> GenerationConfig:
        return self.language_model.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.language_model.generation_config = value

    @property
    def base_model(self) -> PersimmonModel:
        return self.language_model.model

    def get_output_embeddings(self) -> nn.Linear:
        return self.language_model.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.language_model.lm_head = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As of the language model. The placeholder token must stay."""
        image_token_id = self.config.image_token_id
        if new_num_tokens is not None and new_num_tokens <= image_token_id:
            raise ValueError(f"image_token_id {image_token_id} is past a vocabulary of {new_num_tokens} tokens")
        embedding = self.language_model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config = self.config.replace(text_config=self.language_model.config)
        return embedding

    def _config_to_save(self) -> ModelConfig:
        return self.config

    @classmethod
    def _config_from(cls, stored: ModelConfig) -> FuyuConfig:
        if not isinstance(stored, FuyuConfig):
            raise ConfigError("model_type", repr(FuyuConfig.model_type), repr(stored.model_type))
        return stored

    @staticmethod
    def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
        assert isinstance(model, FuyuForCausalLM)
        vision = "vision_embed_tokens."
        own = {name.removeprefix(vision): tensor for name, tensor in tensors.items() if name.startswith(vision)}
        model.vision_embed_tokens.load_state_dict(own, strict=True, assign=True)
        PersimmonForCausalLM._load(model.language_model, text_tensors(model.config, tensors))

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        patches: Patches | None,
        indices: Tensor | None,
        past: int,
    ) -> Tensor:
        """[batch_size, seqlen, hidden_size]: embeddings of the tokens and, at the placeholders, of the patches."""
        embeds = self.language_model.model._embed(
            None if input_ids is None else input_ids.to(self.device),
            None if inputs_embeds is None else inputs_embeds.to(self.device),
        )
        if patches is None:
            if indices is not None and bool((indices >= 0).any()):
                raise ValueError("image_patches_indices is given without image_patches")
            return embeds
        batch_size, seqlen = embeds.shape[:2]
        vision = self.vision_embed_tokens
        given = _Patches(patches, batch_size, self.config, vision.weight)
        if indices is None:
            places = self._placeholders(input_ids, embeds)
            sources = given.in_order(places.sum(1).tolist(), self.config.image_token_id, past)
        else:
            indices = _checked_indices(indices, batch_size, seqlen)
            places = indices >= 0
            if input_ids is not None and not torch.equal(places, self._placeholders(input_ids, embeds).cpu()):
                raise ValueError(
                    f"image_patches_indices must be >= 0 exactly where input_ids is {self.config.image_token_id} "
                    "(config.image_token_id)"
                )
            sources = given.at(indices)
        rows = vision(given.flat[sources.to(given.flat.device)])
        targets = places.flatten().nonzero().squeeze(1).to(embeds.device)
        return embeds.flatten(0, 1).index_copy(0, targets, rows).view_as(embeds)

    def _placeholders(self, input_ids: Tensor | None, embeds: Tensor) -> Tensor:
        """[batch_size, seqlen] bool."""
        image_token_id = self.config.image_token_id
        if input_ids is not None:
            return input_ids == image_token_id
        return (embeds == self.language_model.model.embed_tokens.weight[image_token_id]).all(-1)


def _one_of(image_patches: Patches | None, pixel_values: Patches | None) -> Patches | None:
    if image_patches is not None and pixel_values is not None:
        raise ValueError("image_patches and pixel_values are two names of the same argument: give one of them")
    return pixel_values if image_patches is None else image_patches


class _Patches:
    """The patches of a batch.

    Attributes:
        flat: [num_patches, patch_elements], sample after sample.
        counts: patches of each sample; None where a tensor does not say which sample a patch belongs to.
    """

    def __init__(self, patches: Patches, batch_size: int, config: FuyuConfig, weight: Tensor) -> None:
        """`weight`: what the patches will be multiplied with; they move to its device and dtype."""
        self._config, self._weight = config, weight
        if isinstance(patches, Tensor):
            self.flat = self._rows(patches, "")
            self.counts = [patches.shape[1]] * batch_size if patches.dim() == 3 else None
            if patches.dim() == 3 and patches.shape[0] != batch_size:
                raise ValueError(
                    f"image_patches must be [batch_size={batch_size}, num_patches, {config.patch_elements}], got "
                    f"{list(patches.shape)}: flatten it to two dimensions, or give a list with one entry per sample"
                )
            return
        if not isinstance(patches, Sequence) or isinstance(patches, str):
            found = type(patches).__name__
            raise ValueError(f"image_patches must be a tensor, or a list with one entry per sample, got {found}")
        if len(patches) != batch_size:
            expected = f"one entry per sample (None: no image), {batch_size}"
            raise ValueError(f"image_patches must have {expected}, got {len(patches)}")
        samples = [self._of_sample(entry, index) for index, entry in enumerate(patches)]
        self.flat = torch.cat(samples)
        self.counts = [len(sample) for sample in samples]

    def _of_sample(self, entry: Tensor | Sequence[Tensor] | None, index: int) -> Tensor:
        images = [] if entry is None else [entry] if isinstance(entry, Tensor) else list(entry)
        none = self._weight.new_empty(0, self._config.patch_elements)
        return torch.cat([none, *(self._rows(image, f" of sample {index}") for image in images)])

    def _rows(self, patches: Tensor, where: str) -> Tensor:
        """[num_patches, patch_elements]."""
        config = self._config
        if not isinstance(patches, Tensor):
            raise ValueError(f"image_patches{where} must be a tensor, got {type(patches).__name__}")
        if patches.dim() not in (2, 3) or patches.shape[-1] != config.patch_elements:
            values = f"patch_size^2 * num_channels = {config.patch_size}^2 * {config.num_channels}"
            hint = ": FuyuProcessor cuts images into patches" if patches.dim() == 4 else ""
            raise ValueError(
                f"image_patches{where} must hold patches of {values} = {config.patch_elements} values, "
                f"got {list(patches.shape)}{hint}"
            )
        return patches.reshape(-1, config.patch_elements).to(self._weight)

    def in_order(self, tokens: list[int], image_token_id: int, past: int) -> Tensor:
        """Row of `flat` of each placeholder; tokens: placeholders of each sample."""
        names = f"placeholder tokens (config.image_token_id = {image_token_id})"
        if past:
            names += (
                f"; past_key_values holds {past} columns already: give images with the tokens that hold their "
                "placeholders, and none in later steps"
            )
        for index, (found, expected) in enumerate(zip(self.counts or tokens, tokens, strict=True)):
            if found != expected:
                raise ValueError(f"image_patches: sample {index} has {found} patches for {expected} {names}")
        if len(self.flat) != sum(tokens):
            per_sample = f" (by sample {tokens})" if len(tokens) > 1 else ""
            raise ValueError(f"image_patches: {len(self.flat)} patches for {sum(tokens)}{per_sample} {names}")
        return torch.arange(len(self.flat))

    def at(self, indices: Tensor) -> Tensor:
        """Row of `flat` of each index >= 0."""
        counts = self.counts
        if counts is None:  # nothing but the indices says where a sample ends
            counts = (indices.amax(1) + 1).tolist()
            if sum(counts) != len(self.flat):
                raise ValueError(f"image_patches: {len(self.flat)} patches, image_patches_indices names {sum(counts)}")
        sources, start = [], 0
        for index, (row, count) in enumerate(zip(indices, counts, strict=True)):
            used = row[row >= 0]
            if len(used) and int(used.max()) >= count:
                raise ValueError(
                    f"image_patches_indices: sample {index} names patch {int(used.max())} of {count} (they start at 0)"
                )
            sources.append(used + start)
            start += count
        return torch.cat(sources)


def _checked_indices(indices: Tensor, batch_size: int, seqlen: int) -> Tensor:
    """[batch_size, seqlen] on the CPU. transformers 4's FuyuProcessor adds columns of -1 for tokens to be generated."""
    if indices.dim() != 2 or indices.shape[0] != batch_size or indices.shape[1] < seqlen:
        expected = f"[batch_size={batch_size}, seqlen={seqlen} or more]"
        raise ValueError(f"image_patches_indices must be {expected}, got {list(indices.shape)}")
    indices = indices.cpu().long()
    if bool((indices[:, seqlen:] >= 0).any()):
        raise ValueError(f"image_patches_indices must be -1 past the {seqlen} tokens of input_ids")
    return indices[:, :seqlen]
