"""A stand-in for torch.cuda.CUDAGraph on a CPU: it records the ops of a run with the tensors and numbers that they got,
and replays just these, running no Python of the recorded function again.

As with the real thing, a capture computes nothing that stays: what the ops wrote is undone. And what a capture on a
GPU refuses fails here too: reading a value of a tensor, or making a tensor from values of the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

REFUSED = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::masked_select", "aten::item"}


class RecordedGraph(TorchDispatchMode):
    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self.num_replays = 0
        self._tape: list[tuple[Any, Any, Any, list[int]]] = []
        self._made: dict[int, int] = {}  # id of a tensor that the run made -> its number
        self._alive: list[Tensor] = []  # so that ids and addresses are not given out twice
        self._own_storages: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}
        try:
            with self:
                run()
        finally:
            for storage, contents in self._before.values():
                storage.copy_(contents)
            del self._before, self._own_storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        for argument, value in zip(
            func._schema.arguments, (*args, *[None] * len(func._schema.arguments)), strict=False
        ):
            value = kwargs.get(argument.name, value)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self._keep_contents(value)
        out = func(*args, **kwargs)
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        shared = {t.untyped_storage().data_ptr() for t in inputs}
        self._own_storages |= {t.untyped_storage().data_ptr() for t in outputs} - shared
        refer = self._reference
        self._tape.append((func, tree_map(refer, args), tree_map(refer, kwargs), []))
        for tensor in outputs:
            self._made[id(tensor)] = len(self._alive)
            self._tape[-1][3].append(len(self._alive))
            self._alive.append(tensor)
        return out

    def replay(self) -> None:
        self.num_replays += 1
        made: dict[int, Tensor] = {}
        for func, args, kwargs, numbers in self._tape:

            def resolve(value: Any, made: dict[int, Tensor] = made) -> Any:
                return made[value.number] if isinstance(value, _Made) else value

            out = func(*tree_map(resolve, args), **tree_map(resolve, kwargs))
            made |= zip(numbers, (t for t in tree_flatten(out)[0] if isinstance(t, Tensor)), strict=True)

    def _reference(self, value: Any) -> Any:
        return _Made(self._made[id(value)]) if isinstance(value, Tensor) and id(value) in self._made else value

    def _keep_contents(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own_storages:
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))


class _Made:
    """A tensor that an earlier op of the tape makes."""

    def __init__(self, number: int) -> None:
        self.number = number
