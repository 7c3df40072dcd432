"""What a pager that was killed leaves on a medium, and what the next one makes of it.

Regions end with their pager: their pages that were still in memory are gone, so no region is opened
on what is left. What does survive is the volume: each region's extent, listed as stale, with every
page that the store had taken. That is what is looked at here.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import restart_scenarios
from media import PAGE, completed, read
from proof import Child, call, check
from restart_scenarios import NAMES, SIZE, noise
from userswap.backends.registry import open_stack
from userswap.backends.store import Geometry, PageLostError
from userswap.backends.volume import open_volume
from userswap.backends.window import Window
from userswap.engine import cli

pytestmark = pytest.mark.privileged  # the kernel itself faults on these pages
PAGES = SIZE // PAGE
URLS = ("checksum::file:{}?size=64MiB", "checksum::lmdb:{}", "encrypt::file:{}?size=64MiB")
Command = Callable[..., dict[str, Any]]


def killed_with(url: str) -> dict[str, list[int]]:
    """Two regions page to a store, and their pager is killed; returns the pages that were out."""
    with Child(call(restart_scenarios.page_and_wait, url=url)) as child:
        stored: dict[str, list[int]] = json.loads(child.said("stored"))
        os.kill(int(child.said("pager")), signal.SIGKILL)
        assert child.wait(20) == -signal.SIGABRT
        assert child.left_over() == []
    return stored


@pytest.fixture
def listed(capsys: pytest.CaptureFixture[str]) -> Command:
    """What `userswap store list --json` says."""

    def command(*arguments: str) -> dict[str, Any]:
        assert cli.main(["store", "list", "--json", *arguments]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return command


async def looked_at(url: str, name: str, stored: list[int]) -> list[int]:
    """A killed region's pages, as a pager finds them: what was out is there, what was not reads as
    zeros or as it was written earlier, and nothing is another's. Returns the pages that are
    lost."""
    volume = await open_volume(await open_stack(url, Geometry()), name=url)
    (extent,) = [each for each in volume.stale if each.name == name]
    window, damaged = Window(volume, extent), list[int]()
    try:
        for page in range(PAGES):
            try:
                found = await read(window, page)
            except PageLostError as error:
                damaged.append(page if error.page == page else -1)
                continue
            possible = {noise(name, page), *([] if page in stored else [bytes(PAGE)])}
            assert found in possible, f"page {page} of {name}"
    finally:
        await window.aclose()
    return damaged


@pytest.mark.parametrize("stack", URLS[:2])
def test_a_killed_pagers_regions_are_kept_apart_listed_and_reclaimed(
    stack: str, tmp_path: Path, listed: Command
) -> None:
    url = completed(stack).format(tmp_path / "medium")
    stored = killed_with(url)
    for pager in ("none", "another"):
        if pager == "another":
            check(call(restart_scenarios.page_anew, url=url))
        extents = listed(url)["extents"]
        assert [(each["name"], each["pages"], each["stale"]) for each in extents] == [
            (name, PAGES, True) for name in NAMES
        ]
        for name in NAMES:
            assert asyncio.run(looked_at(url, name, stored[name])) == []
    assert len(listed(url, "--reclaim")["reclaimed"]) == len(NAMES)
    assert listed(url)["extents"] == []


def flip(medium: Path, base: int, page: int) -> None:
    """Change one byte of a stored page on the medium."""
    path = medium / "data.mdb" if medium.is_dir() else medium
    at = (base + page) * PAGE + 1000
    if medium.is_dir():
        at = path.read_bytes().index(noise("one", page)[1000:1064])
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x20]))


@pytest.mark.parametrize("stack", URLS)
def test_a_byte_that_changed_while_no_pager_ran_is_one_lost_page(
    stack: str, tmp_path: Path, listed: Command
) -> None:
    """PageLostError is what makes a page SIGBUS (tests/test_sealed.py, tests/test_loss.py)."""
    url = completed(stack).format(tmp_path / "medium")
    stored = killed_with(url)
    one, _ = listed(url)["extents"]
    page = stored["one"][len(stored["one"]) // 2]
    flip(tmp_path / "medium", one["base"], page)
    assert asyncio.run(looked_at(url, "one", stored["one"])) == [page]
    assert asyncio.run(looked_at(url, "two", stored["two"])) == []
    check(call(restart_scenarios.page_anew, url=url))
    assert asyncio.run(looked_at(url, "one", stored["one"])) == [page]
