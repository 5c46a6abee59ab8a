"""200 prompts: code heads of the kinds that the shipped model knows, of different lengths."""

OPENINGS = [
    "def read_config(path):",
    "class Parser:\n    def __init__(self",
    "import os\nimport sys\n\n",
    "for i in range(",
    "    if not isinstance(value, ",
    "try:\n    import json\nexcept",
    "raise ValueError(",
    "# Return the number of",
    "with open(filename",
    '"""Utilities for',
    "@property\n    def name(",
    "async def main():\n    await",
    "assert len(",
    "elif key in self._",
    "logger = logging.",
    "return [x for x in",
    "    def test_",
    "while True:\n        line =",
    "lambda x:",
    "self.assertEqual(",
]
ENDINGS = ["", " ", "\n    ", "\n        return", " # é ∂ 漢字", "\n\n", "self.", "None", " = 0", "\n    pass\n\ndef "]
PROMPTS = [opening + ending for opening in OPENINGS for ending in ENDINGS]
assert len(set(PROMPTS)) == 200
