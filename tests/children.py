"""Children that use regions: what they must do, and whether their pagers end."""

from __future__ import annotations

import time
from pathlib import Path

from support import run_child

PAGER_NAME = "userswap-pager"


def good(code: str, *args: str, timeout: float = 40) -> str:
    """Run code that must end well, without a word on standard error; what it printed."""
    child = run_child(code, args=args, timeout=timeout)
    assert (child.returncode, child.stderr) == (0, ""), (
        f"{child.returncode}\n{child.stdout}\n{child.stderr}"
    )
    return child.stdout


def gone(pid: int, within: float = 10) -> bool:
    """Whether the pager of that number ends in time: nobody may have waited for it yet, and the
    number may be another's by now."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            if name != PAGER_NAME or rest.split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False
