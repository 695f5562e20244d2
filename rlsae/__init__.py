"""What did this tuning change inside my language model, and how sure are we?

Importing the package stays light: Snakemake parses the Snakefile, and with it `rlsae.config`, for every cluster job.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsae.interpretation.interventions.attach import attach, latents_at
    from rlsae.notebook import open_study

__version__ = "0.1.0"
__all__ = ["attach", "latents_at", "open_study"]

_HOMES = {"attach": "interpretation.interventions.attach", "latents_at": "interpretation.interventions.attach"}
_HOMES |= {"open_study": "notebook"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
