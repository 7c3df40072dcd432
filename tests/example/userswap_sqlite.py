import sqlite3
from collections.abc import Sequence
from typing import Any

from userswap.backends import store
from userswap.backends.grammar import LayerSpec


class SqliteStore(store.Store):
    durable, space = True, "rows of an SQLite database"

    def __init__(self, path: str, geometry: store.Geometry) -> None:
        self.page_size, self.page_count = geometry.page_size, geometry.page_count or store.PAGES_MAX
        self.db = sqlite3.connect(path, timeout=0, isolation_level=None)
        for setting in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"):
            self.do(f"PRAGMA {setting}")
        self.do("CREATE TABLE IF NOT EXISTS pages (number INTEGER PRIMARY KEY, content BLOB)")

    def do(self, sql: str, *values: object) -> list[Any]:
        try:
            return self.db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            kind = store.StoreFullError if "full" in str(error) else store.StoreFailedError
            raise kind(str(error), store="sqlite") from error

    async def read(self, runs: Sequence[store.Run]) -> None:
        for run in runs:
            pages, place = store.pages_of(self, run), run.buffer.cast("B")
            query = "SELECT * FROM pages WHERE number BETWEEN ? AND ?"
            found = dict(self.do(query, pages.start, pages.stop - 1))
            place[:] = b"".join(found.get(page, bytes(self.page_size)) for page in pages)

    async def write(self, runs: Sequence[store.Run]) -> None:
        for run in runs:
            for at, page in enumerate(store.pages_of(self, run)):
                content = run.buffer.cast("B")[at * self.page_size :][: self.page_size]
                self.do("REPLACE INTO pages VALUES (?, ?)", page, content)

    async def discard(self, index: int, count: int) -> None:
        pages = store.pages_between(self, index, count)
        self.do("DELETE FROM pages WHERE number BETWEEN ? AND ?", pages.start, pages.stop - 1)

    async def flush(self) -> None:
        self.do("PRAGMA wal_checkpoint(FULL)")

    async def aclose(self) -> None:
        self.db.close()


def open_store(layer: LayerSpec, geometry: store.Geometry) -> store.Store:
    return SqliteStore(layer.target, geometry)
