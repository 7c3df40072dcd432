"""Regions that are touched and verified without a pause: `python -m toucher PROGRESS URL...`.

What every page has to hold is kept outside of the paged memory. The number of touches so far is in
the file PROGRESS; lines on standard input are answered between two touches. A page that does not
hold what it should ends the process.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import select
import sys

from userswap import Region

PAGE = 4096
SIZE = 3 << 20
RESIDENT = 1280 << 10
AT_ONCE = 8


def content(region: int, page: int, version: int) -> bytes:
    return b"".join(n.to_bytes(8, "little") for n in (region, page, version, 7)) * (PAGE // 32)


class Paged:
    """A region, and what is in it."""

    def __init__(self, url: str, number: int) -> None:
        self.number = number
        self.region = Region(SIZE, resident=RESIDENT, store=url, name=f"t{number}")
        self.memory = self.region.memory
        self.versions = [0] * (SIZE // PAGE)
        """None: discarded"""
        self.written = 0

    def expected(self, page: int) -> bytes:
        version = self.versions[page]
        return content(self.number, page, version) if version else bytes(PAGE)

    def write(self, page: int) -> None:
        self.written += 1
        self.versions[page] = self.written
        self.memory[page * PAGE : (page + 1) * PAGE] = self.expected(page)

    def check(self, page: int) -> None:
        found = self.memory[page * PAGE : (page + 1) * PAGE]
        if found != self.expected(page):
            sys.exit(
                f"page {page} of {self.region.name}: {bytes(found[:32]).hex()}, version "
                f"{self.versions[page]} was expected"
            )

    def touch(self, rng: random.Random) -> None:
        page = rng.randrange(len(self.versions))
        self.check(page)
        match rng.randrange(64):
            case 0:
                count = min(AT_ONCE, len(self.versions) - page)
                self.region.discard(page * PAGE, count * PAGE)
                self.versions[page : page + count] = [0] * count
            case n if n < 32:
                self.write(page)

    def find_lost(self) -> list[int]:
        """The pages that cannot be read; all others hold what they should."""
        sink = os.memfd_create("read")
        lost = []
        for page in range(len(self.versions)):
            try:
                os.pwrite(sink, self.memory[page * PAGE : (page + 1) * PAGE], 0)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                lost.append(page)
            else:
                self.check(page)
        os.close(sink)
        return lost


def answer(line: str, regions: list[Paged]) -> str:
    match line:
        case "verify":
            for paged in regions:
                for page in range(len(paged.versions)):
                    paged.check(page)
        case "flush":
            for paged in regions:
                paged.region.flush()
        case "lost":
            return json.dumps([paged.find_lost() for paged in regions])
        case "stats":
            return json.dumps([paged.region.stats().as_dict() for paged in regions])
        case other:
            sys.exit(f"{other}?")
    return "good"


def main(progress: str, urls: list[str]) -> None:
    rng = random.Random(1)
    with open(progress, "r+b") as file:
        counter = mmap.mmap(file.fileno(), 8)
    regions = [Paged(url, number) for number, url in enumerate(urls)]
    for paged in regions:
        for page in range(len(paged.versions)):
            paged.write(page)
    print("filled", flush=True)
    touches = 0
    while True:
        for paged in regions:
            paged.touch(rng)
        touches += 1
        counter[:] = touches.to_bytes(8, "little")
        if touches % 8 == 0 and select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline().strip()
            if not line or line == "end":
                break
            print(answer(line, regions), flush=True)
    for paged in regions:
        paged.region.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
