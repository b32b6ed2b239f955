"""A second device for machines that have none: tensors carry a mark of where they are.

Nothing is moved and no number changes. Inside `Elsewhere`, a storage that was `put` there is on the
other device; every operation hands the mark on and fails, as an accelerator does, when it meets a
tensor from here. A tensor made with an explicit `device=`, or inside torch's own functions, fits
either side; one made without is from here. `travel()` lets `fit` train there: the first steps and
evaluations of every call are watched, so it costs next to nothing.
"""

import functools
import gc

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

HERE, EITHER, THERE = "here", "either", "there"
MAKERS = {  # take `device`, and land on the CPU without it
    getattr(torch, name)
    for name in "arange empty eye full hann_window linspace logspace ones rand randint randn "
    "randperm tensor tril_indices triu_indices zeros".split()
}
MOVERS = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.new_tensor}
READERS = {torch.Tensor.numpy, torch.Tensor.__array__}
COPIES = {"copy_", "_to_copy"}  # read from any device
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}  # positions may be from here


class DevicesMixed(AssertionError):
    "An operation met tensors of both devices."


class Elsewhere(TorchDispatchMode):
    "While it is on, operations know on which device their tensors are."

    def __init__(self):
        super().__init__()
        self.marks = {}  # of storages; the weak references keep addresses from being used again
        self.moved = None  # the mark of what is made now, whatever it is made of
        self.calls = _Calls(self)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def put(self, nest, mark=THERE):
        "Mark every tensor of a nest, or of a module; the same nest."
        tensors = [*nest.parameters(), *nest.buffers()] if isinstance(nest, nn.Module) else nest
        for t in tree_iter(tensors):
            if torch.is_tensor(t):
                storage = t.untyped_storage()
                self.marks[storage._cdata] = mark, StorageWeakRef(storage)
        return nest

    def of(self, t) -> str:
        return self.marks.get(t.untyped_storage()._cdata, (HERE,))[0]

    def alive(self) -> list:
        "The marked storages that somebody still holds."
        return [ref for mark, ref in self.marks.values() if mark == THERE and not ref.expired()]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        met = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        marks = {self.of(t) for t in met if t.ndim or self.of(t) == THERE}
        if name in INDEXES and self.of(met[0]) != HERE:
            marks -= {HERE}
        if marks >= {HERE, THERE} and name not in COPIES:
            said = ", ".join(f"{tuple(t.shape)} {self.of(t)}" for t in met)
            raise DevicesMixed(f"{name}: expected all tensors on one device, got {said}")
        out = func(*args, **kwargs)
        known = {id(t) for t in met}
        mark = THERE if THERE in marks else HERE if HERE in marks else EITHER
        mark = self.moved or mark
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor) and id(t) not in known and not _views(t, met):
                self.put([t], mark)
        return out


def _views(t, met) -> bool:
    "Does it share the memory of an input, and so its mark?"
    return any(t.untyped_storage()._cdata == m.untyped_storage()._cdata for m in met)


class _Calls(TorchFunctionMode):
    "What only the call in Python says: whether a device was named, and what is moved."

    def __init__(self, where: Elsewhere):
        super().__init__()
        self.where = where

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, where = kwargs or {}, self.where
        if func in READERS and not kwargs.get("force") and where.of(args[0]) == THERE:
            raise DevicesMixed(f"numpy: expected a tensor from here, got {tuple(args[0].shape)}")
        before = where.moved
        where.moved = _lands(func, args, kwargs) or before
        try:
            out = func(*args, **kwargs)
            if func is torch.tensor or func is torch.Tensor.new_tensor:
                where.put([out], where.moved)
            return out.clone() if args and out is args[0] and where.moved else out
        finally:
            where.moved = before


def _lands(func, args, kwargs) -> str | None:
    "Where a call that makes or moves tensors brings them; None for any other."
    if func in MAKERS:
        return HERE if kwargs.get("device") is None else EITHER
    if func is torch.Tensor.cpu:
        return HERE
    if func is torch.Tensor.new_tensor:
        return EITHER
    named = [*args[1:], *kwargs.values()]
    says = any(isinstance(a, (str, torch.device, torch.Tensor)) for a in named)
    return EITHER if func in MOVERS and says else None


def travelling(fit, steps: int = 2):
    "`fit`, with the model elsewhere while its first steps and evaluations run."

    @functools.wraps(fit)
    def away(model, batch, loss, config, evaluate=None, **more):
        where, left = Elsewhere(), {"loss": steps, "evaluate": steps}

        def watched(name, function):
            def call(model, *given):
                if not left[name]:
                    return function(model, *given)
                left[name] -= 1
                where.put(model)
                given = where.put(tree_map_only(torch.Tensor, torch.clone, given))
                with where:
                    return function(model, *given)

            return call

        seen = evaluate and watched("evaluate", evaluate)
        history = fit(model, batch, watched("loss", loss), config, seen, **more)
        return _nothing_left(where, history, model)

    return away


def _nothing_left(where, history, model):
    "Fail for tensors that were made elsewhere and outlive `fit`, other than the model's own."
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    if any(ref.cdata not in own for ref in where.alive()):
        gc.collect()
    left = [ref for ref in where.alive() if ref.cdata not in own]
    if left:
        raise DevicesMixed(f"{len(left)} tensors were made elsewhere and not brought back")
    return history


def travel():
    "From here on `fit` trains elsewhere; called before anybody imports it from its module."
    from tfbench.train import loop

    loop.fit = travelling(loop.fit)
