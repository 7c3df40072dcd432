"""`userswap store list`: the stores and filters that there are; or what a volume holds.

What a layer is about is read from its module's first sentence, without running anybody's code.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import importlib.util
import json
import re
import textwrap
import time
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from userswap.backends import registry
from userswap.backends.grammar import format_size
from userswap.backends.store import Geometry
from userswap.backends.volume import Extent, Volume, VolumeError, examine, open_volume

SCHEMA = "userswap.store.list/1"
VOLUME_SCHEMA = "userswap.store.volume/1"
COLUMNS = 100


@dataclass(frozen=True)
class Layer:
    """A store or a filter that a URL may name."""

    name: str
    kind: str
    about: str
    provider: str
    install: str
    """The command that installs what it needs; empty where nothing is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the stores and filters that there are, also those that need a package which is not "
        "installed. With a URL: the extents of the volume on that medium. A volume that no pager "
        "has open has only stale ones: their pager was killed. They are kept until their room is "
        "needed, or --reclaim is given. What was exported is kept until --forget names it. A "
        "medium that is not a volume is left as it is."
    )
    parser.epilog = (
        "examples:\n"
        "  userswap store list\n"
        "  userswap store list --json | jq -r '.layers[].name'\n"
        "  userswap store list file:/var/lib/swap\n"
        "  userswap store list file:/var/lib/swap --reclaim"
    )
    parser.add_argument("url", nargs="?", metavar="URL", help="a store, as Region takes it")
    parser.add_argument("--reclaim", action="store_true", help="discard the stale extents")
    parser.add_argument("--forget", metavar="NAME", help="discard what was exported as NAME")


def run(arguments: argparse.Namespace) -> int:
    if arguments.url is None:
        print(_layers_as_json() if arguments.json else _layers_as_text())
    else:
        print(asyncio.run(_volume(arguments)))
    return 0


# --- layers ---


def layers() -> list[Layer]:
    found = [("store", point) for point in registry.stores().values()]
    found += [("filter", point) for point in registry.filters().values()]
    return [_layer(kind, point) for kind, point in found]


def _layer(kind: str, point: EntryPoint) -> Layer:
    ours = point.module.startswith("userswap.")
    provider = "userswap" if ours or point.dist is None else point.dist.name
    install = registry.missing(point.name) if ours else ""
    return Layer(point.name, kind, _about(point.module), provider, install)


def _about(module: str) -> str:
    """The first sentence of a module, without what only its own readers want."""
    try:
        spec = importlib.util.find_spec(module)
        source = Path(spec.origin).read_text() if spec and spec.origin else ""
        text = ast.get_docstring(ast.parse(source)) or ""
    except (ImportError, OSError, SyntaxError, ValueError):
        return ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = paragraph.partition(". ")[0].rstrip(".")
    return re.sub(r"^`[a-z+]+:[^`]*` ", "", sentence).replace("`", "")


def _layers_as_json() -> str:
    document = {"schema": SCHEMA, "layers": [asdict(layer) for layer in layers()]}
    return json.dumps(document, indent=2)


def _layers_as_text() -> str:
    found = layers()
    width = max(len(layer.name) for layer in found) + 4
    lines: list[str] = []
    for kind, title in (("store", "stores"), ("filter", "filters, over any store")):
        lines += [*([""] if lines else []), title]
        for layer in (layer for layer in found if layer.kind == kind):
            name = layer.name + (":" if kind == "store" else "::")
            about = layer.about or f"of {layer.provider}"
            about += f" (from {layer.provider})" if layer.provider != "userswap" else ""
            indent = " " * (width + 2)
            lines += textwrap.wrap(
                about, COLUMNS, initial_indent=f"  {name:{width}}", subsequent_indent=indent
            )
            lines += [f"{indent}not installed: {layer.install}"] if layer.install else []
    return "\n".join(lines)


# --- a volume ---


async def _volume(arguments: argparse.Namespace) -> str:
    url = arguments.url
    store = await registry.open_stack(url, Geometry(existing=True))
    try:
        contents = await examine(store, name=url)
        if contents is None:
            raise VolumeError("is blank: no volume has been made on it yet", store=url)
        volume = await open_volume(store, name=url)
        reclaimed = [
            extent
            for extent in volume.stale
            if (extent.name == arguments.forget if extent.kept else arguments.reclaim)
        ]
        if arguments.forget and all(extent.name != arguments.forget for extent in reclaimed):
            raise VolumeError(f"has nothing that was exported as {arguments.forget}", store=url)
        for extent in reclaimed:
            await volume.reclaim(extent)
        if arguments.json:
            return json.dumps(_as_json(url, volume, reclaimed), indent=2)
        return _as_text(volume, reclaimed)
    finally:
        await store.aclose()


def _as_json(url: str, volume: Volume, reclaimed: list[Extent]) -> dict[str, Any]:
    stale = volume.stale
    return {
        "schema": VOLUME_SCHEMA,
        "url": url,
        "volume": str(volume.uuid),
        "page_size": volume.page_size,
        "pages": volume.store.page_count,
        "free_pages": volume.free_pages,
        "extents": [
            {
                "name": extent.name,
                "uuid": str(extent.uuid),
                "base": extent.base,
                "pages": extent.pages,
                "created": extent.created,
                "stale": extent in stale,
                "kept": extent.kept,
            }
            for extent in volume.extents
        ],
        "reclaimed": [str(extent.uuid) for extent in reclaimed],
    }


def _as_text(volume: Volume, reclaimed: list[Extent]) -> str:
    extents, page = volume.extents, volume.page_size
    room = format_size(volume.store.page_count * page)
    free = format_size(volume.free_pages * page)
    lines = [f"volume {volume.uuid}: {room} in pages of {format_size(page)}, {free} free"]
    if reclaimed:
        size = format_size(sum(extent.pages for extent in reclaimed) * page)
        lines.append(f"{len(reclaimed)} stale extents reclaimed, {size}")
    if not extents:
        return "\n".join([*lines, "no extents"])
    stale = volume.stale
    names = max(4, *(len(extent.name) for extent in extents))
    lines.append(f"{'name':{names}}  {'size':>9}  {'first page':>12}  since                state")
    for extent in extents:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(extent.created))
        size = format_size(extent.pages * page)
        state = "in use"
        if extent in stale:
            state = "kept" if extent.kept else "stale"
        lines.append(f"{extent.name:{names}}  {size:>9}  {extent.base:>12}  {since}  {state}")
    return "\n".join(lines)
