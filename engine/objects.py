"""A store given as an object of Python, on its way to the pager.

The pager is another process, so what is given is pickled: a store that can be, or a function that
makes one of a Geometry. As with `multiprocessing`, the program's main module is imported in the
pager where the object comes from there, and has to guard its own work with `__name__`.

Must not know: who opens the store, which pager there is.
"""

from __future__ import annotations

import base64
import inspect
import pickle
from collections.abc import Callable
from multiprocessing import spawn
from typing import Any, cast

from userswap.backends.store import Geometry, Store, StoreError, StoreFailedError
from userswap.engine.errors import ConfigError

OBJECT_PREFIX = "object:"
TEXT_MAX = 60_000
"""It is part of a control message."""
_importing = False
"""The main module of a client is being imported, in the pager."""


def pickled(store: object) -> str:
    """A store, or a function that makes one of a Geometry, as text for the pager.

    Raises ConfigError for what cannot cross to another process.
    """
    if not isinstance(store, Store) and not callable(store):
        raise ConfigError(f"store={store!r}: give a store URL, such as 'ram:lz4', or a Store")
    preparation = spawn.get_preparation_data("userswap-pager")
    del preparation["authkey"]  # which must not be pickled, and is for other purposes
    try:
        data = pickle.dumps((preparation, pickle.dumps(store)))
    except Exception as error:
        raise ConfigError(
            f"store={store!r} cannot be sent to the pager, which is another process ({error}); "
            "give a function that makes the store, such as functools.partial(MyStore, path)"
        ) from None
    text = OBJECT_PREFIX + base64.b85encode(data).decode()
    if len(text) > TEXT_MAX:
        raise ConfigError(f"store={type(store).__name__} takes {len(text)} bytes, over {TEXT_MAX}")
    return text


async def unpickled(text: str) -> Store:
    """Make the store of `pickled`, where the main module of the client is importable too."""
    preparation, data = pickle.loads(base64.b85decode(text.removeprefix(OBJECT_PREFIX)))
    try:
        _import_main(preparation)
        made = pickle.loads(data)
        if not isinstance(made, Store):
            made = cast(Callable[[Geometry], Any], made)(Geometry())
        if inspect.isawaitable(made):
            made = await made
    except StoreError:
        raise
    except ConfigError as error:
        raise StoreFailedError(str(error), store="object") from error
    except Exception as error:
        raise StoreFailedError(f"cannot be made in the pager: {error!r}", store="object") from error
    if not isinstance(made, Store):
        raise StoreFailedError(f"{type(made).__name__} is no store", store="object")
    return made


def _import_main(preparation: dict[str, Any]) -> None:
    global _importing
    _importing = True
    try:
        spawn.prepare(preparation)
    finally:
        _importing = False


def refuse_in_import() -> None:
    """Raises ConfigError where a region is opened by the import of `unpickled`: a pager of the
    pager's own would import it again, and so on."""
    if _importing:
        raise ConfigError(
            "the pager imports the program's main file for it, and that opens a region as it is "
            'imported: guard its work by `if __name__ == "__main__":`, or put the store into a '
            "module of its own"
        )
