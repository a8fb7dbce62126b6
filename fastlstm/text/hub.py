"""The base class that takes models to Hugging Face's hub and back, where its package is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Hub", "require"]


def require(method: str) -> None:
    """Raise ImportError for a method that needs huggingface_hub where it is missing."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise ImportError(
            f"{method}: huggingface_hub is not installed: pip install 'fastlstm[hub]'",
            name="huggingface_hub",
        ) from None


if TYPE_CHECKING:
    from huggingface_hub import PyTorchModelHubMixin as Hub
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin as Hub
    except ImportError:

        class Hub:
            """Stands in for it, and says what is missing."""

            def __init_subclass__(cls, **model_card: Any) -> None:
                super().__init_subclass__()

            def push_to_hub(self, *_: Any, **__: Any) -> None:
                require("push_to_hub")
