"""One library for all of distillation: what a big, slow or costly teacher knows, made small, fast or cheap.

Everything here is imported on first use, so that `import limbeck` stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.caching import cache
    from limbeck.core.run import Run
    from limbeck.distilling import distill
    from limbeck.finished import evaluate, export, load
    from limbeck.listing import list_methods
    from limbeck.planning import plan
    from limbeck.report import write_report
    from limbeck.running import run
    from limbeck.sampling import sample
    from limbeck.sweeping import sweep

__all__ = [
    "Run",
    "cache",
    "distill",
    "evaluate",
    "export",
    "list_methods",
    "load",
    "plan",
    "run",
    "sample",
    "sweep",
    "write_report",
]

_PLACES = {
    "Run": "limbeck.core.run",
    "cache": "limbeck.caching",
    "distill": "limbeck.distilling",
    "evaluate": "limbeck.finished",
    "export": "limbeck.finished",
    "list_methods": "limbeck.listing",
    "load": "limbeck.finished",
    "plan": "limbeck.planning",
    "run": "limbeck.running",
    "sample": "limbeck.sampling",
    "sweep": "limbeck.sweeping",
    "write_report": "limbeck.report",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("limbeck")
    if name not in _PLACES:
        raise AttributeError(f"module 'limbeck' has no attribute '{name}'")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
