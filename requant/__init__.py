"""Quantize a Hugging Face base model, prove that the result works, and publish it.

>>> import requant
>>> requant.inspect("build/result").mtp.precision
'BF16'

The functions are the commands of the command line; see `docs/how-to/python.md`. Nothing that they need is imported
before it is used.

The folders `flows/`, `tasks/` and `deployments/` of the project are links in this package. So their modules have one
name, `requant.flows...` and `requant.tasks...`, in a checkout, in an installation and for every tool that reads the
code, and a `tasks.py` or a `flows/` of a user's own never takes their place.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as in `typing`, whose import is the longest part of `import requant`
if TYPE_CHECKING:
    from requant.flows.api import compare, inspect, mtp_fix, plan, run, validate, verify
    from requant.tasks.errors import RequantError
    from requant.tasks.recipe.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "RequantError", "compare", "inspect", "mtp_fix", "plan", "run", "validate", "verify"]
_MODULES = {"Recipe": "requant.tasks.recipe.recipe", "RequantError": "requant.tasks.errors"}


def __getattr__(name: str) -> object:
    """Import an exported name when it is used for the first time."""
    if name not in __all__:
        raise AttributeError(f"module 'requant' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "requant.flows.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
