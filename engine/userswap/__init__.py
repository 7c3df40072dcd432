"""Swap in user space: a program's memory, paged to a store of your choice within a budget.

`Region` and its statistics are imported when they are first asked for: the command line's help must
not wait for the C core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from userswap.engine.errors import (
    ConfigError,
    PagerError,
    ResidentError,
    UnsupportedError,
    UserswapError,
)

if TYPE_CHECKING:
    from userswap.engine.region import Region
    from userswap.engine.stats import Latency, RegionStats

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "Latency",
    "PagerError",
    "Region",
    "RegionStats",
    "ResidentError",
    "UnsupportedError",
    "UserswapError",
    "__version__",
]
_LATER = {"Region": "region", "Latency": "stats", "RegionStats": "stats"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"userswap.engine.{_LATER[name]}"), name)
    globals()[name] = value
    return value
