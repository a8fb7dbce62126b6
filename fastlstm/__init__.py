"""fastlstm: a fused LSTM for PyTorch that drops in for ``nn.LSTM``."""

from importlib import metadata

from . import startup

try:
    from . import functional, packing, reference, text  # noqa: F401  they are public
    from .algorithms import algorithm, explain
    from .convert import from_torch, to_torch
    from .generation.generate import generate
    from .modules import LSTM, LSTMCell
    from .ops.native import empty_cache
    from .packing import prepack
except (ImportError, ValueError) as error:
    startup.refuse_command(error)
    raise

__all__ = [
    "LSTM",
    "LSTMCell",
    "__version__",
    "algorithm",
    "empty_cache",
    "explain",
    "from_torch",
    "functional",
    "generate",
    "prepack",
    "to_torch",
]

try:
    __version__ = metadata.version("fastlstm")
except metadata.PackageNotFoundError:  # imported from a source folder that was never installed
    __version__ = "0+unknown"


def __dir__() -> list[str]:
    """The public names; what else is here are the modules that the package consists of."""
    return sorted([*__all__, "algorithms", "packing", "reference", "text"])
