import sqlite3

from userswap.backends import store


class SqliteStore(store.Store):
    durable, space = True, "rows of an SQLite database"

    def __init__(self, layer, geometry):
        self.page_size, self.page_count = geometry.page_size, geometry.page_count or store.PAGES_MAX
        self.db = sqlite3.connect(layer.target, timeout=0, isolation_level=None)
        for setting in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"):
            self.do(f"PRAGMA {setting}")
        self.do("CREATE TABLE IF NOT EXISTS pages (number INTEGER PRIMARY KEY, content BLOB)")

    def do(self, sql, *values):
        try:
            return self.db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            kind = store.StoreFullError if "full" in str(error) else store.StoreFailedError
            raise kind(str(error), store="sqlite") from error

    async def read(self, runs):
        for run in runs:
            pages = store.pages_of(self, run)
            query = "SELECT * FROM pages WHERE number BETWEEN ? AND ?"
            found = dict(self.do(query, pages.start, pages.stop - 1))
            run.buffer[:] = b"".join(found.get(page, bytes(self.page_size)) for page in pages)

    async def write(self, runs):
        for run in runs:
            for at, page in enumerate(store.pages_of(self, run)):
                content = run.buffer[at * self.page_size : (at + 1) * self.page_size]
                self.do("REPLACE INTO pages VALUES (?, ?)", page, content)

    async def discard(self, index, count):
        pages = store.pages_between(self, index, count)
        self.do("DELETE FROM pages WHERE number BETWEEN ? AND ?", pages.start, pages.stop - 1)

    async def flush(self):
        self.do("PRAGMA wal_checkpoint(FULL)")

    async def aclose(self):
        self.db.close()
