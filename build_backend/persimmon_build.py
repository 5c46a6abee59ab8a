"""PEP 517 backend: setuptools, but building against the torch that is already installed.

An extension using torch's C++ API only loads into the torch it was compiled for, and pip's
isolated build environment would otherwise install a second torch that may differ from the
user's. So: what the target environment already has is used from there; only what it lacks
is asked of pip.
"""

import json
import os
import subprocess
import sys

DEFAULT = {
    "setuptools": "setuptools>=77",
    "torch": "torch>=2.11,<2.14",
    "ninja": "ninja>=1.11",
    "cmake": "cmake>=3.25",
    "pybind11": "pybind11>=2.13",
}
MINIMUM = {"setuptools": (77,), "torch": (2, 11), "pybind11": (2, 13)}

_PROBE = """
import json, shutil, sys, importlib.metadata as m
out = {"path": [p for p in sys.path if p], "have": {}}
for n in ("setuptools", "torch", "pybind11", "ninja", "cmake"):
    try: out["have"][n] = m.version(n)
    except m.PackageNotFoundError: pass
print(json.dumps(out))
"""


def _host():
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    if os.environ.get("PERSIMMON_BUILD_ISOLATED") == "1":
        return {"path": [], "have": {}}
    try:
        return json.loads(subprocess.check_output([sys.executable, "-c", _PROBE], env=env, text=True))
    except Exception:
        return {"path": [], "have": {}}


def _version(s):
    out = []
    for part in s.split("+")[0].split("."):
        if not part.isdigit():
            break
        out.append(int(part))
    return tuple(out)


def _missing(host):
    import shutil

    need = []
    for name, req in DEFAULT.items():
        have = host["have"].get(name)
        if have and _version(have) >= MINIMUM.get(name, (0,)):
            continue
        if name in ("ninja", "cmake") and shutil.which(name):
            continue
        need.append(req)
    return need


def _requires(config_settings=None):
    return _missing(_host())


get_requires_for_build_wheel = get_requires_for_build_editable = _requires


def get_requires_for_build_sdist(config_settings=None):
    return [] if "setuptools" in _host()["have"] else [DEFAULT["setuptools"]]


def _setuptools():
    seen = set(sys.path)
    sys.path += [p for p in _host()["path"] if p not in seen]  # after the isolated ones
    from setuptools import build_meta

    return build_meta


def _hook(name):
    def call(*args, **kwargs):
        return getattr(_setuptools(), name)(*args, **kwargs)

    call.__name__ = name
    return call


for _n in (
    "build_wheel",
    "build_sdist",
    "build_editable",
    "prepare_metadata_for_build_wheel",
    "prepare_metadata_for_build_editable",
):
    globals()[_n] = _hook(_n)
