"""Everything between checked arguments and the native operators.

``dispatch`` chooses what runs a call, ``autograd`` has the gradients; below them are the native
operators, above them are ``fastlstm.functional`` and the modules.
"""

from . import registrations  # noqa: F401  it tells torch of the operators
from .autograd import forward_and_saved, lstm

__all__ = ["forward_and_saved", "lstm"]
