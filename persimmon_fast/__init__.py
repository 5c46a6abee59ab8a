"""Persimmon-8B on handwritten kernels. Importing this starts neither CUDA nor the heavy dependencies."""

from persimmon_fast.version import __version__

__all__ = ["__version__"]
