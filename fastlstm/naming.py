"""How ``print(model)`` tells the modules of this package from torch's of the same name."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def shown_name(module: nn.Module, ours: type[nn.Module]) -> str:
    """The name of a module's class, after ``fastlstm.`` where the class is ``ours``.

    A subclass of the user's keeps its name.
    """
    name = type(module).__name__
    exact = parametrize.type_before_parametrizations(module) is ours
    return f"fastlstm.{name}" if exact else name
