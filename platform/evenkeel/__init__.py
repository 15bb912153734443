"""evenkeel trains PyTorch models on changing sets of unequal GPUs, and does not stop."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evenkeel.trainer import ElasticTrainer as ElasticTrainer

__version__ = "0.1.0"
__all__ = ["ElasticTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports ElasticTrainer when it is first asked for: nothing heavy comes with the package itself."""
    if name == "ElasticTrainer":
        from evenkeel.trainer import ElasticTrainer

        return ElasticTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
