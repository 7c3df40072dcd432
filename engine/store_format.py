"""`userswap store format`: make an empty volume of a medium; by force, of one that is not blank."""

from __future__ import annotations

import argparse
import asyncio
import json

from userswap.backends import registry
from userswap.backends.grammar import format_size
from userswap.backends.store import Geometry, Store
from userswap.backends.volume import VolumeError, examine, format_volume
from userswap.engine.errors import ConfigError

SCHEMA = "userswap.store.format/1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make an empty volume of the medium that a URL names. A blank medium needs no format: "
        "opening a region on it does the same. One that holds anything else is taken only with "
        "--force, and what it held is discarded; without, this says what that would be."
    )
    parser.epilog = (
        "exit code: 0 formatted, 1 refused and left as it was\n\n"
        "examples:\n"
        "  userswap store format file:/var/lib/swap\n"
        "  userswap store format --force file:/dev/vdb"
    )
    parser.add_argument("url", metavar="URL", help="a store, as Region takes it")
    parser.add_argument("--force", action="store_true", help="lose what is on the medium")


def run(arguments: argparse.Namespace) -> int:
    return asyncio.run(_format(arguments))


async def _format(arguments: argparse.Namespace) -> int:
    url = arguments.url
    innermost: list[Store] = []

    def seen(store: Store) -> Store:
        innermost.append(store)
        return store

    store = await registry.open_stack(url, Geometry(), wrap=seen)
    try:
        _check_medium(url, innermost[0])
        held, blank = await _held(store, url)
        refused = not blank and not arguments.force
        if not refused:
            await format_volume(store, name=url, force=arguments.force)
        size = store.page_count * store.page_size
    finally:
        await store.aclose()
    if arguments.json:
        document = {
            "schema": SCHEMA,
            "url": url,
            "held": held,
            "formatted": not refused,
            "bytes": size,
        }
        print(json.dumps(document, indent=2))
    elif refused:
        print(f"{url} {held}\nLeft as it is; with --force all of it is lost.")
    else:
        lost = "" if blank else f"; it was taken by force (it {held})"
        print(f"{url} is an empty volume of {format_size(size)} now{lost}")
    return int(refused)


def _check_medium(url: str, innermost: Store) -> None:
    """A store that ends with this command has nothing that a format could help."""
    spec = registry.parse(url)
    named = spec.store.target or registry.foreign_layers(spec)
    if innermost.native is not None or not named:
        raise ConfigError(
            f"{url} is memory of the pager that opens it: there is no medium to format"
        )


async def _held(store: Store, url: str) -> tuple[str, bool]:
    """What the medium holds, in words; and whether that is nothing."""
    try:
        contents = await examine(store, name=url)
    except VolumeError as error:
        return error.found or str(error.args[0]), False
    if contents is None:
        return "is blank", True
    size = format_size(sum(extent.pages for extent in contents.extents) * store.page_size)
    names = sorted({extent.name for extent in contents.extents})
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    extents = f"{len(contents.extents)} extents of {size} in all" if names else "no extents"
    return f"holds a volume with {extents}{f' ({listed})' if listed else ''}", False
