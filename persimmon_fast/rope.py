"""Rotary frequencies and the table of cosines and sines, for every rope type of transformers 5.23.

Position p rotates the pair (i, i + rotary_dim / 2) of a head by the angle p * inv_freq[i]. The types differ in inv_freq
and in one factor on the table. All of it is fp32, made on the CPU and then moved: each device holds the same bits. The
table of Adept's server holds fewer of them, see docs/rotary_precision.md.
"""

import math

import torch

from persimmon_fast.config import PersimmonConfig

ADEPT_DTYPE = {"adept_fp16": torch.float16, "adept_bf16": torch.bfloat16}


class RotaryTable:
    """The cosines and sines of a model, made when first needed and grown with the longest sequence seen.

    Not a buffer: model.to(bfloat16) must not round it (0.75 rad at position 1,000), and checkpoints do not hold it.
    """

    _MIN_ROWS = 2048

    def __init__(self, config: PersimmonConfig) -> None:
        self._config = config
        self._key: tuple[object, ...] | None = None
        self._table = torch.empty(0)
        stretch = config.rope_scaling["factor"] if config.rope_type == "dynamic" and config.rope_scaling else 1
        self.limit = int(config.max_position_embeddings * stretch)
        # of these two types the whole table changes with the length of the sequence
        self.depends_on_length = config.rope_type in ("dynamic", "longrope")

    def __call__(self, seq_len: int, device: torch.device) -> torch.Tensor:
        """cos_sin [at least seq_len, rotary_dim] for sequences of up to seq_len tokens."""
        if seq_len > self.limit:
            raise ValueError(
                f"position {seq_len - 1} is past this model's last position {self.limit - 1} "
                f"(max_position_embeddings={self._config.max_position_embeddings}, rope type {self._config.rope_type})"
            )
        rows = min(self.limit, max(self._MIN_ROWS, 1 << (seq_len - 1).bit_length() if seq_len else 1))
        served = seq_len if self.depends_on_length else None
        key = (served, device)
        if key != self._key or self._table.shape[0] < rows:  # it never shrinks: a CUDA graph may hold its address
            self._table, self._key = rope_cos_sin(self._config, rows, served, device), key
        return self._table


def rope_inv_freq(
    config: PersimmonConfig, seq_len: int | None = None, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, float]:
    """Angle per position of each rotated pair, and the factor on its cosine and sine.

    Args:
        config: names the rope type, theta and the fraction of the head.
        seq_len: longest sequence in tokens that the frequencies will serve. "dynamic" stretches them when it is above
            max_position_embeddings, "longrope" takes its long factors when it is above
            original_max_position_embeddings; the other types do not look. None: a short one.
        device: where the result lies.

    Returns:
        inv_freq: [rotary_dim / 2], fp32, radians per token.
        attention_scaling: factor on cos and sin, dimensionless; 1 but for yarn and longrope.

    Source: transformers 5.23 modeling_rope_utils.py (formulas re-derived and compared in tests/test_config.py); Su et
        al. 2021 arXiv:2104.09864 (rotary), Peng et al. 2023 arXiv:2309.00071 (yarn), Ding et al. 2024 arXiv:2402.13753
        (longrope), Dubey et al. 2024 arXiv:2407.21783 (llama3).
    """
    dim, scaling = config.rotary_dim, config.rope_scaling or {}
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim  # 2i / rotary_dim
    theta, attention_scaling = config.rope_theta, 1.0
    rope_type = config.rope_type

    if rope_type == "dynamic":  # theta grows with the sequence so that the slowest pair is stretched by the excess
        stretch = max(seq_len or 0, config.max_position_embeddings) / config.max_position_embeddings
        theta *= (scaling["factor"] * stretch - (scaling["factor"] - 1)) ** (dim / (dim - 2))
    wavelength_over_2pi = theta**exponent
    if rope_type == "longrope":
        original = scaling["original_max_position_embeddings"]
        factors = scaling["long_factor" if (seq_len or 0) > original else "short_factor"]
        wavelength_over_2pi = torch.tensor(factors, dtype=torch.float32) * wavelength_over_2pi
        attention_scaling = _longrope_attention_scaling(config)
    inv_freq = 1.0 / wavelength_over_2pi

    if rope_type in ("linear", "proportional"):
        inv_freq = inv_freq / scaling.get("factor", 1.0)
    elif rope_type == "yarn":
        keep = 1 - _yarn_ramp(config)  # 1 where a pair turns often and stays, 0 where it is slowed by `factor`
        inv_freq = 1.0 / (scaling["factor"] * wavelength_over_2pi) * (1 - keep) + inv_freq * keep
        attention_scaling = _yarn_attention_scaling(config)
    elif rope_type == "llama3":
        inv_freq = _llama3(config, inv_freq)
    return inv_freq.to(device), attention_scaling


def rope_cos_sin(
    config: PersimmonConfig,
    num_positions: int,
    seq_len: int | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The table that rotary kernels read: row p holds cos(p * inv_freq), then sin(p * inv_freq).

    Args:
        config: as in `rope_inv_freq`.
        num_positions: rows, >= 0; positions 0 .. num_positions - 1.
        seq_len: as in `rope_inv_freq`; only "dynamic" and "longrope" look at it.
        device: where the result lies.

    Returns:
        [num_positions, rotary_dim], fp32, contiguous: columns 0 .. rotary_dim / 2 - 1 cosines, the rest sines, times
        attention_scaling. The layout of vLLM's cos_sin_cache. With a rope_precision of Adept's, the values are those of
        a table in its dtype.

    Raises:
        ValueError: num_positions is negative.
    """
    if num_positions < 0:
        raise ValueError(f"rope_cos_sin: num_positions must be >= 0, got {num_positions}")
    inv_freq, attention_scaling = rope_inv_freq(config, seq_len)
    if config.rope_precision != "fp32":
        return _rounded_cos_sin(inv_freq, num_positions, ADEPT_DTYPE[config.rope_precision]).to(device)
    angle = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
    return (torch.cat((angle.cos(), angle.sin()), dim=-1) * attention_scaling).to(device)


def _rounded_cos_sin(inv_freq: torch.Tensor, num_positions: int, dtype: torch.dtype) -> torch.Tensor:
    """The table of Adept's server: positions, frequencies, angles, cosines and sines each rounded to dtype."""
    position = torch.arange(num_positions).to(dtype)  # not arange(dtype=dtype): in bf16 a CPU misses some from 4,113 on
    angle = position[:, None] * inv_freq.to(dtype)
    wide = angle.double()  # the cosine in fp32 is then the nearest one, on every processor
    return torch.cat((wide.cos(), wide.sin()), dim=-1).float().to(dtype).float()


def _yarn_ramp(config: PersimmonConfig) -> torch.Tensor:
    """[rotary_dim / 2]: 0 for pairs that turn more than beta_fast times in the original context, 1 below beta_slow."""
    assert config.rope_scaling is not None
    scaling, dim = config.rope_scaling, config.rotary_dim

    def pair_that_turns(times: float) -> float:
        positions_per_radian = scaling["original_max_position_embeddings"] / (times * 2 * math.pi)
        return dim * math.log(positions_per_radian) / (2 * math.log(config.rope_theta))

    low = pair_that_turns(scaling.get("beta_fast", 32.0))
    high = pair_that_turns(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def _yarn_attention_scaling(config: PersimmonConfig) -> float:
    assert config.rope_scaling is not None
    scaling, factor = config.rope_scaling, config.rope_scaling["factor"]

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def _longrope_attention_scaling(config: PersimmonConfig) -> float:
    assert config.rope_scaling is not None
    scaling, original = config.rope_scaling, config.rope_scaling["original_max_position_embeddings"]
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor = scaling.get("factor", config.max_position_embeddings / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(config: PersimmonConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """Slow pairs are slowed by `factor`, fast ones stay, those between are blended by their turns per context."""
    assert config.rope_scaling is not None
    scaling = config.rope_scaling
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
    smooth = (turns - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    return torch.where(turns < low, inv_freq / factor, torch.where(turns > high, inv_freq, blended))
