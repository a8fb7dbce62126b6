"""Exchange torch's LSTM modules for fastlstm's, and back, in a model that is already built."""

from __future__ import annotations

import copy as copying
import sys
from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from .modules import LSTM, LSTMCell, extra_options

__all__ = ["from_torch", "to_torch"]

# A subclass that defines no more than these is exchanged: they do not change what a call computes.
_PASSING = {"__init__", "reset_parameters", "extra_repr", "__annotate__", "__annotate_func__"}


def from_torch(module: nn.Module, *, copy: bool = False) -> nn.Module:
    """Exchange every ``nn.LSTM`` and ``nn.LSTMCell`` for fastlstm's module.

    Args:
        module: an ``nn.LSTM``, an ``nn.LSTMCell``, or a model that contains some at any depth.
        copy: False (default): the modules found are exchanged **in place**, inside the model
            given, and every new module holds **the same Parameter objects** as the old one, so
            that an optimizer built before keeps working and tied weights stay tied. True: the
            model is deep-copied first; the one given stays as it is and nothing is shared.

    Returns:
        ``module`` itself with its parts exchanged (its copy with ``copy=True``), or, where
        ``module`` is an LSTM, the new module. A model that holds fastlstm's modules already, or
        only such as are left alone (below), is returned as it is.

    What goes along: training mode, ``requires_grad``, gradients, hooks (also handles obtained
    before still remove theirs, unless copied), parametrizations and old-style ``weight_norm``,
    further attributes. A module that occurs in several places is exchanged for one that does.

    What is left alone: subclasses that define methods (such as ``forward``) or attributes, modules
    whose ``forward`` was replaced on the instance or that were compiled in place, and modules
    that the model holds outside of its registered children, as in a plain list. An exchanged
    module is no longer an ``nn.LSTM`` for ``isinstance``; test for ``nn.modules.rnn.RNNBase``.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: it neither is nor holds an LSTM, torch's or fastlstm's; an LSTM is itself what
            ``torch.compile`` was given: convert it before.
    """
    known = (nn.LSTM, nn.LSTMCell, LSTM, LSTMCell)
    if isinstance(module, nn.Module) and not any(isinstance(m, known) for m in module.modules()):
        raise ValueError(
            "module: expected an nn.LSTM, an nn.LSTMCell or a model that holds one, "
            f"got: {type(module).__name__}, which holds none"
        )
    return _exchange_all(module, {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}, copy)


def to_torch(module: nn.Module, *, copy: bool = False) -> nn.Module:
    """Exchange every fastlstm module for torch's: the way back, on the terms of `from_torch`.

    A model without any is returned as it is.

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: an LSTM has an option that changes its numbers and that torch's has not, or
            is itself what ``torch.compile`` was given.
    """
    for name, inner in module.named_modules() if isinstance(module, nn.Module) else ():
        for option in extra_options(inner) if isinstance(inner, LSTM) else ():
            if option != "checkpoint_every":
                raise ValueError(f"{name or 'module'}: nn.LSTM has no {option}")
    return _exchange_all(module, {LSTM: nn.LSTM, LSTMCell: nn.LSTMCell}, copy)


def _exchange_all(
    module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]], copy: bool
) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module should be an nn.Module, got: {type(module).__name__}")
    for part in module.modules():
        inner = part._modules.get("_orig_mod") if isinstance(part, _compiled()) else None
        if inner is not None and _base(inner, classes) is not None:
            raise ValueError(
                f"module: an {type(inner).__name__} was given to torch.compile by itself, whose "
                "result would go on to call it: convert it first, then compile it"
            )
    if copy:
        module = copying.deepcopy(module)
    done: dict[nn.Module, nn.Module] = {}  # old to new, so that shared modules stay shared
    for parent in reversed(list(module.modules())):  # inner parts before what holds them
        for name, child in parent._modules.items():
            if child is not None:
                new = done.get(child) or _exchange(child, classes)
                if new is not child:
                    parent._modules[name] = done[child] = new
    return done.get(module) or _exchange(module, classes)


def _compiled() -> tuple[type, ...]:
    """What ``torch.compile`` makes of a module. Where Dynamo was never imported, there is none."""
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return () if frame is None else (frame.OptimizedModule,)


def _exchange(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """A module of the other family with the state of this one, or this one."""
    base = _base(module, classes)
    if base is None:
        return module
    target = classes[base]
    if parametrize.is_parametrized(module):
        # torch gave the instance a class of its own, whose properties compute the weights.
        properties = {
            k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")
        }
        target = type(f"Parametrized{target.__name__}", (target,), properties)
    # __init__ would make and initialise weights only to drop them, so it is not called. All state
    # is in __dict__. The registries are copied, so that later changes of one module do not reach
    # the other. Hooks are not: their handles refer to the registry itself.
    new = target.__new__(target)
    for name, value in vars(module).items():
        is_registry = isinstance(value, (dict, list, set)) and "_hooks" not in name
        new.__dict__[name] = copying.copy(value) if is_registry else value
    return new


def _base(module: nn.Module, classes: Iterable[type[nn.Module]]) -> type[nn.Module] | None:
    """Of these classes the one that a module is exchanged as; None where it is left alone."""
    base = next((cls for cls in classes if isinstance(module, cls)), None)
    return base if base is not None and _plain(module, base) else None


def _plain(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether base's own methods are all there is to this module's behaviour."""
    if "forward" in vars(module) or module._compiled_call_impl is not None:
        return False
    cls = type(module)
    if parametrize.is_parametrized(module):
        cls = parametrize.type_before_parametrizations(module)
    added = cls.__mro__[: cls.__mro__.index(base)]
    return all(
        name in _PASSING or (name.startswith("__") and not callable(value))
        for owner in added
        for name, value in vars(owner).items()
    )
