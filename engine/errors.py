"""The errors that users of the library see, and how they cross from the pager to its client.

A message is one line that names the cause and, where there is one, the remedy.
"""

from __future__ import annotations


class UserswapError(Exception):
    """Base of every error of this library."""

    kind = "error"


class ConfigError(UserswapError, ValueError):
    """What was asked for cannot be: a size, a store URL, an option."""

    kind = "config"


class UnsupportedError(UserswapError):
    """This kernel, user or machine cannot do it."""

    kind = "unsupported"


class ResidentError(UserswapError):
    """A budget could not be reached; the message says what holds the pages."""

    kind = "resident"


class PagerError(UserswapError):
    """The pager died, or answered what cannot be understood."""

    kind = "pager"


class ReleasedError(UserswapError):
    """The region was given back to its program: what was paged is ordinary memory now."""

    kind = "released"


_BY_KIND: dict[str, type[UserswapError]] = {
    error.kind: error
    for error in (
        UserswapError,
        ConfigError,
        UnsupportedError,
        ResidentError,
        PagerError,
        ReleasedError,
    )
}


def from_kind(kind: str, message: str) -> UserswapError:
    """The exception that a pager's answer stands for."""
    return _BY_KIND.get(kind, UserswapError)(message)
