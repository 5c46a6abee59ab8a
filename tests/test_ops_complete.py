"""Every op of csrc/ops/schemas.h is there in every layer: wrapper, Meta and CPU kernel, definition, test."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from persimmon_fast import ops, reference

PREFIX = "persimmon_fast::"
SCHEMAS = {
    schema.name.removeprefix(PREFIX): schema
    for schema in sorted(torch._C._jit_get_all_schemas(), key=lambda schema: schema.name)
    if schema.name.startswith(PREFIX)
}


def test_the_schemas_are_those_of_the_library():
    library = Path(__file__).resolve().parents[1] / "csrc" / "ops" / "schemas.h"
    assert library.read_text().count("m.def(") == len(SCHEMAS) > 0


@pytest.mark.parametrize("name", SCHEMAS)
def test_wrapper_takes_the_arguments_of_the_schema(name):
    wrapper = set(inspect.signature(getattr(ops, name)).parameters)
    assert wrapper == {argument.name for argument in SCHEMAS[name].arguments}
    assert getattr(ops, name).__doc__


@pytest.mark.parametrize("key", ["CPU", "Meta", "Autograd"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_kernel(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(PREFIX + name, key)


@pytest.mark.parametrize("name", SCHEMAS)
def test_definition_in_plain_torch(name):
    # in-place and paged variants share the definition of the op they are named after
    assert callable(getattr(reference, name.removesuffix("_").removesuffix("_paged")))


@pytest.mark.parametrize("name", SCHEMAS)
def test_some_test_calls_it_and_some_opchecks_it(name):
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert any(f"ops.{name}(" in source for source in sources)
    assert any("opcheck(" in source and f"persimmon_fast.{name}" in source for source in sources)
