"""`userswap nvme export`: a store as an NVMe/TCP namespace, until it is told to end.

Responsible for: the command line; which part of which medium is exported; the process.

What is exported is a namespace of plain blocks. A store that others can be in as well is a volume,
as ever, and the namespace an extent of it, named by the subsystem's NQN: a medium that holds
anything else is refused, and an export of the same NQN has the same content again. `ram:` belongs
to this process, and its content ends with it; the NGUID, which is the extent's UUID or else a new
one, tells hosts whether the content is what it was.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4, uuid5

from userswap.backends import registry
from userswap.backends.grammar import format_size, parse_size, without_password
from userswap.backends.nvme_tcp.identify import DISCOVERY_NQN
from userswap.backends.nvme_tcp.server import BLOCK_SIZES, Rules, check_exposure, serve
from userswap.backends.nvme_tcp.url import is_nqn
from userswap.backends.store import PAGE_SIZE, Geometry, Store
from userswap.backends.volume import Volume, open_volume
from userswap.backends.window import Window
from userswap.engine.errors import ConfigError, UnsupportedError
from userswap.engine.notify import notify
from userswap.engine.pager import settle_process
from userswap.engine.stores import open_store

SCHEMA = "userswap.nvme.export/1"
LISTEN = "127.0.0.1:4420"
NAME_BYTES = 88
"""Of an extent's name."""
OUR_NAMES = UUID("6f0f3c52-6d1f-4a52-9d1c-6f5a3f0a8f31")
"""The namespace of the UUIDs in NQNs that nobody gave."""

EPILOG = """\
examples:
  userswap nvme export --store ram:lz4 --size 4GiB
  userswap nvme export --store file:/var/lib/swap --size 64GiB --nqn nqn.2026-01.org.example:swap
  userswap nvme export --listen 10.0.0.1:4420 --store ram:lz4 --size 4GiB \\
      --allow-host nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555

Hosts are known by the NQN that they give, and nothing is encrypted: beyond this machine use a
private network, or WireGuard. SIGTERM or Ctrl-C ends it, after what was answered is flushed.
"""

log = logging.getLogger("userswap.nvme")


@dataclass(frozen=True)
class Exported:
    """A store of the namespace's size, and the identity of what it holds."""

    store: Store
    identity: UUID


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Export a store as an NVMe/TCP namespace, so that other machines page to it: with "
        "userswap, or as a block device with any NVMe/TCP host.\n\n"
        "A file, a device, a database is used as a volume: the namespace is an extent of it that "
        "bears the subsystem's name, and is there again when it is exported again. What ram: "
        "holds ends with this command."
    )
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--store", required=True, metavar="URL", help="the store, as Region takes it")
    add("--size", metavar="SIZE", help="of the namespace; one that is there has its size")
    add("--listen", default=LISTEN, metavar="HOST:PORT", help="where (%(default)s)")
    add("--nqn", help="the subsystem's name (made of this machine's and the store's)")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NQN",
        help="a host that may connect; again. Without any: every user of this machine",
    )
    add(
        "--block-size",
        type=int,
        default=4096,
        choices=BLOCK_SIZES,
        help="bytes of a block (%(default)s)",
    )
    add("--connections", type=int, default=128, metavar="N", help="at most (%(default)s)")
    add("--queues", type=int, default=8, metavar="N", help="for I/O, of one host (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    host, port = parse_address(arguments.listen)
    url: str = arguments.store
    registry.parse(url)
    nqn = arguments.nqn or _own_nqn(url)
    for name in (nqn, *arguments.allow_host):
        if not is_nqn(name) or name == DISCOVERY_NQN:
            raise ConfigError(f"{name!r} is no NQN: use one such as nqn.2026-01.org.example:swap")
    if arguments.connections < 2 or not 1 <= arguments.queues <= 64:
        raise ConfigError("--connections: use 2 or more; --queues: use 1 to 64")
    allowed = frozenset(arguments.allow_host) or None
    try:
        check_exposure(host, allowed)
    except ValueError as error:
        raise ConfigError(
            f"--listen {arguments.listen}: {error} (--allow-host NQN, once for each)"
        ) from None
    rules = Rules(hosts=allowed, connections=arguments.connections, queues=arguments.queues)
    size = parse_size(arguments.size) if arguments.size else None
    settle_process("userswap-export", [signal.SIGHUP, signal.SIGPIPE])
    log.setLevel(logging.INFO)
    asyncio.run(_export(arguments, (host, port), nqn, size, rules))
    return 0


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, [ADDRESS]:PORT, or of either without a port."""
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]*))(?::([0-9]{1,5}))?", text)
    port = int(match[3] or LISTEN.rpartition(":")[2]) if match else -1
    if match is None or not 0 <= port <= 65535:
        raise ConfigError(f"{text!r} is no address: use one such as {LISTEN} or [::1]:4420")
    return match[1] or match[2], port


def address_text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _own_nqn(url: str) -> str:
    """The same for the same store on the same machine."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = os.uname().nodename
    return f"nqn.2014-08.org.nvmexpress:uuid:{uuid5(OUR_NAMES, f'{machine} {url}')}"


def extent_name(nqn: str) -> str:
    """The NQN, or where that is too long its beginning and a digest."""
    if len(nqn) <= NAME_BYTES:
        return nqn
    digest = hashlib.blake2b(nqn.encode(), digest_size=8).hexdigest()
    return f"{nqn[: NAME_BYTES - len(digest) - 1]}~{digest}"


async def open_exported(url: str, nqn: str, size: int | None) -> Exported:
    """The store of a namespace: a new one, or the one that had this name before."""
    if size is not None and (size < PAGE_SIZE or size % PAGE_SIZE):
        raise ConfigError(f"--size {format_size(size)}: use a multiple of {format_size(PAGE_SIZE)}")
    store = await open_store(url)
    if store.native is not None:
        await store.aclose()
        pages = _pages(size)
        return Exported(await registry.open_stack(url, Geometry(pages)), uuid4())
    try:
        return await _in_volume(store, url, nqn, size)
    except BaseException:
        await store.aclose()
        raise


async def _in_volume(store: Store, url: str, nqn: str, size: int | None) -> Exported:
    label = without_password(url)
    volume: Volume = await open_volume(store, name=label)
    extent = volume.adopt(extent_name(nqn))
    if extent is None:
        extent = await volume.allocate(extent_name(nqn), _pages(size))
    held = extent.pages * store.page_size
    if size not in (None, held):
        raise ConfigError(
            f"--size {format_size(size or 0)}: {nqn} is on {label} already and has "
            f"{format_size(held)}; leave --size out, use another --nqn, or lose what it holds by "
            f"`userswap store list {label} --forget {extent.name}`"
        )
    return Exported(Window(volume, extent), extent.uuid)


def _pages(size: int | None) -> int:
    if size is None:
        raise ConfigError("--size SIZE: how large shall the namespace be?")
    return size // PAGE_SIZE


async def _export(
    arguments: argparse.Namespace,
    listen: tuple[str, int],
    nqn: str,
    size: int | None,
    rules: Rules,
) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    exported = await open_exported(arguments.store, nqn, size)
    store = exported.store
    try:
        try:
            server = await serve(
                store,
                nqn=nqn,
                listen=listen,
                block_size=arguments.block_size,
                nguid=exported.identity.bytes,
                rules=rules,
            )
        except OSError as error:
            raise UnsupportedError(f"--listen {arguments.listen}: {error.strerror}") from None
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        async with server:
            _announce(arguments, server.address, nqn, exported)
            notify(READY="1", STATUS="exporting")
            await ended.wait()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)  # the second one does not wait
        counts = ", ".join(f"{count} {name}" for name, count in server.stats().items() if count)
        log.info("ended, all of it flushed: %s", counts or "nobody came")
    finally:
        await store.aclose()


def _announce(
    arguments: argparse.Namespace, address: tuple[str, int], nqn: str, exported: Exported
) -> None:
    host, port = address
    where = address_text(host, port)
    store = exported.store
    size = store.page_count * store.page_size
    document = {
        "schema": SCHEMA,
        "pid": os.getpid(),
        "store": without_password(arguments.store),
        "address": where,
        "nqn": nqn,
        "nsid": 1,
        "bytes": size,
        "block_size": arguments.block_size,
        "identity": str(exported.identity),
        "durable": store.durable,
        "url": f"nvme+tcp://{where}/{nqn}",
    }
    if arguments.json:
        print(json.dumps(document), flush=True)
        return
    kept = "outlives this command" if store.durable else "ends with this command"
    print(f"{document['store']}: {format_size(size)}, which {kept}, at\n{document['url']}")
    print(f"Linux: nvme connect -t tcp -a {host} -s {port} -n {nqn}", flush=True)
