"""A mistake of a test kernel, and the message that must tell it."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    case: str
    message: str  # regular expression
    number: int = 0
    architecture: int = 80


AT = r"at \w+\.cu:\d+"
THREAD = r"block \(0,0,0\) thread \(\d+,0,0\), warp \d+ lane \d+"
