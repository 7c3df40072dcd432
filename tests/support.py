"""Helpers that tests import: child processes, above all.

Code that touches paged memory always runs in a child process. A thread that waits for a page holds
the interpreter lock, so a fault that is never served could not be interrupted from inside.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

MOVER = "USERSWAP_TEST_MOVER"
"""Environment variable: the mover that the regions of children get by default."""
TOLD_BY_PROTECT = "userswap: the mover protect may lose"


def session_members(session: int) -> list[int]:
    """The processes of a session, zombies left out."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The command name may hold spaces and brackets; the last bracket ends it.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, member_of = fields[0], int(fields[3])
        if member_of == session and state != "Z":
            members.append(int(entry.name))
    return members


def kill_session(session: int) -> None:
    """SIGKILL every process of a session; those that are gone already do not matter."""
    for pid in session_members(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_child(
    code: str,
    *,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run Python source in a child process that leads a session of its own.

    `env` is added to this process's environment. When the time is up the child's whole session is
    killed: the return code is then -SIGKILL and the last line of stderr says so, for tests that
    expect a child to hang. Output goes through files: a process left behind cannot hold them open
    against us as it could a pipe.

    Where the environment asks for a mover, the child's regions have it, and what that mover always
    says is left out of stderr.
    """
    mover = os.environ.get(MOVER)
    if mover:
        code = f"""import functools, userswap
userswap.Region = functools.partial(userswap.Region, mover={mover!r})
{code}"""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        command = [sys.executable, "-P", "-X", "faulthandler", "-c", code, *args]
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        note = ""
        try:
            child.wait(timeout * float(os.environ.get("USERSWAP_TEST_SLOW", "1")))
        except subprocess.TimeoutExpired:
            note = f"run_child: killed after {timeout} s\n"
        finally:
            if child.returncode is None:
                kill_session(child.pid)
                child.wait()
        stdout.seek(0)
        stderr.seek(0)
        said = [line for line in stderr if not (mover and line.startswith(TOLD_BY_PROTECT))]
        return subprocess.CompletedProcess(
            command, child.returncode, stdout.read(), "".join(said) + note
        )
