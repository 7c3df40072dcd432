"""Numbers on the command line, for argparse: what is wrong with one is said in the user's words.

Must not know: which option it is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A type for add_argument: an integer within bounds."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"'{text}' is not an integer from {low} to {high}")
        return int(text)

    return parse
