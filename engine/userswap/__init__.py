"""Swap in user space: a program's memory, paged to a store of your choice within a budget."""

from __future__ import annotations

from userswap.engine.errors import (
    ConfigError,
    PagerError,
    ResidentError,
    UnsupportedError,
    UserswapError,
)
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
