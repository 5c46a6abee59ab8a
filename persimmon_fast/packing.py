"""From padded batches, as callers hand them over, to packed ones, as the decoder computes them, and back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch lie."""

    batch_size: int
    seqlen: int
    lengths: list[int]  # real tokens of each sequence
    kept: Tensor | None  # indices of the real tokens in the flattened batch; None: all are real

    @classmethod
    def from_mask(cls, mask: Tensor | None, batch_size: int, seqlen: int, past: int) -> Packing:
        """mask: [batch_size, seqlen] or [batch_size, past + seqlen], nonzero where a token counts; None: everywhere."""
        if mask is None:
            return cls(batch_size, seqlen, [seqlen] * batch_size, None)
        if mask.dim() != 2 or mask.shape[0] != batch_size or mask.shape[1] not in (seqlen, past + seqlen):
            raise ValueError(
                f"attention_mask must be [batch_size={batch_size}, seqlen={seqlen} or past + seqlen={past + seqlen}], "
                f"got {list(mask.shape)}"
            )
        real = mask[:, mask.shape[1] - seqlen :].bool()
        lengths = real.sum(1).tolist()
        kept = None if all(n == seqlen for n in lengths) else real.flatten().nonzero().squeeze(1)
        return cls(batch_size, seqlen, lengths, kept)

    def pack(self, padded: Tensor) -> Tensor:
        """[batch_size, seqlen, ...] to [num_tokens, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.kept is None else flat[self.kept]

    def unpack(self, packed: Tensor) -> Tensor:
        """[num_tokens, ...] to [batch_size, seqlen, ...], 0 at padding."""
        if self.kept is not None:
            shape = (self.batch_size * self.seqlen, *packed.shape[1:])
            packed = packed.new_zeros(shape).index_copy(0, self.kept, packed)
        return packed.view(self.batch_size, self.seqlen, *packed.shape[1:])


def checked_seq_len(position_ids: Tensor, batch_size: int, seqlen: int) -> int:
    """Largest position + 1, after checking shape and sign."""
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] != seqlen:
        raise ValueError(
            f"position_ids must be [batch_size={batch_size} or 1, seqlen={seqlen}], got {list(position_ids.shape)}"
        )
    if position_ids.numel() == 0:
        return 0
    low, high = position_ids.aminmax()
    if int(low) < 0:
        raise ValueError(f"position_ids must be >= 0, got {int(low)}")
    return int(high) + 1
