"""The C core as Python sees it: `ffi`, `lib`, and the one place where its errors become exceptions.

C functions return 0 or a count when they succeed and -errno when they fail; nothing above this
module looks at a negative return code except through `check`.
"""

import os

from userswap.native._core import ffi, lib

__all__ = ["check", "ffi", "lib"]


def check(rc: int) -> int:
    """Pass `rc` through if it is not negative, else raise the OSError that it names."""
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))
    return rc
