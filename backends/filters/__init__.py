"""Filters: stores over a store, each of which adds one thing and passes everything else on.

Responsible for: what all filters pass on alike. Must not know: any filter, any store.
"""

from __future__ import annotations

from userswap.backends.store import Store


class Filter(Store):
    """A store over `inner`, with its size and its promises; the methods stay abstract.

    `native` is not passed on: who serves an inner pool by itself goes round the filter, so that a
    filter says itself where that is right.
    """

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.page_size = inner.page_size
        self.page_count = inner.page_count
        self.durable = inner.durable
        self.checked = inner.checked
        self.encrypted = inner.encrypted
        self.space = inner.space
