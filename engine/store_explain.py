"""`userswap store explain`: what a stack of layers guarantees, and which layer does what for it.

Each layer's own word is taken: the stack is opened without its filters first, then with one more
each time. Nothing is written to the medium.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import textwrap
from dataclasses import asdict, dataclass

from userswap.backends import registry
from userswap.backends.grammar import StackSpec, format_size
from userswap.backends.store import PAGES_MAX, Geometry, Store
from userswap.backends.volume import VolumeError, examine

SCHEMA = "userswap.store.explain/1"
COLUMNS = 100


@dataclass(frozen=True)
class Explained:
    """What the stack from the store up to one layer says of itself."""

    layer: str
    durable: bool
    checked: bool
    encrypted: bool
    native: bool
    pages: int
    page_size: int
    space: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what a store URL guarantees: whether pages survive a crash, whether damage is "
        "noticed, what the medium sees, where pages go and what bounds them, how faults are "
        "served. Layer by layer, the store first. The store is opened for this, and neither made "
        "nor written to."
    )
    parser.epilog = (
        "examples:\n"
        "  userswap store explain ram:lz4?limit=2GiB\n"
        "  userswap store explain checksum::file:/var/lib/swap\n"
        "  userswap store explain --json checksum::ram:zstd | jq .guarantees"
    )
    parser.add_argument("url", metavar="URL", help="a store, as Region takes it")


def run(arguments: argparse.Namespace) -> int:
    layers, volume = asyncio.run(_explain(registry.parse(arguments.url), arguments.url))
    said = guarantees(layers[-1], volume)
    if arguments.json:
        document = {
            "schema": SCHEMA,
            "url": arguments.url,
            "layers": [asdict(layer) for layer in layers],
            "guarantees": said,
        }
        print(json.dumps(document, indent=2))
    else:
        print(_as_text(layers, said))
    return 0


async def _explain(spec: StackSpec, url: str) -> tuple[list[Explained], str]:
    layers = []
    volume = ""
    for depth in range(len(spec.filters), -1, -1):
        part = StackSpec(spec.filters[depth:], spec.store)
        filters = part.filters[:1]
        name = f"{filters[0].name}::" if filters else f"{spec.store.name}:{spec.store.target}"
        store = await registry.open_stack(str(part), Geometry(existing=True))
        try:
            layers.append(_explained(name, store))
            if depth == 0 and store.native is None:
                volume = await _volume(store, url)
        finally:
            await store.aclose()
    return layers, volume


def _explained(layer: str, store: Store) -> Explained:
    return Explained(
        layer,
        store.durable,
        store.checked,
        store.encrypted,
        store.native is not None,
        store.page_count,
        store.page_size,
        store.space,
    )


async def _volume(store: Store, url: str) -> str:
    try:
        contents = await examine(store, name=url)
    except VolumeError as error:
        return f"refused: {error.args[0]}"
    if contents is None:
        return "the medium is blank: the first region makes a volume of it"
    return f"a volume with {len(contents.extents)} extents, which regions share"


def guarantees(stack: Explained, volume: str) -> dict[str, str]:
    """The outermost layer's word in sentences, by topic."""
    sized = stack.pages * stack.page_size < PAGES_MAX * stack.page_size // 2
    size = format_size(stack.pages * stack.page_size)
    return {
        "durable": "what a flush confirmed survives the end of the process and of power"
        if stack.durable
        else "no page is promised to survive the end of the pager",
        "checked": "a damaged page is SIGBUS on that page, never wrong bytes"
        if stack.checked
        else "damage of the medium goes unnoticed, as far as the store itself does not notice it",
        "encrypted": "the medium sees only encrypted pages"
        if stack.encrypted
        else "whoever reads the medium reads the pages",
        "faults": "served by the native fault server itself"
        if stack.native
        else "awaited on the pager's event loop",
        "space": f"{stack.space or 'not said'}" + (f"; {size} in all" if sized else ""),
        "volume": volume or "none: every region has a store of its own",
    }


def _as_text(layers: list[Explained], said: dict[str, str]) -> str:
    width = max(5, *(len(layer.layer) for layer in layers))
    lines = [f"{'layer':{width}}  durable  checked  encrypted  native  space"]
    for layer in reversed(layers):
        words = ["yes" if each else "no" for each in _flags(layer)]
        lines.append(
            f"{layer.layer:{width}}  {words[0]:7}  {words[1]:7}  {words[2]:9}  {words[3]:6}  "
            f"{layer.space}"
        )
    lines.append("")
    for topic, sentence in said.items():
        lead = f"{topic:10}"
        lines += textwrap.wrap(sentence, COLUMNS, initial_indent=lead, subsequent_indent=" " * 10)
    return "\n".join(lines)


def _flags(layer: Explained) -> tuple[bool, bool, bool, bool]:
    return layer.durable, layer.checked, layer.encrypted, layer.native
