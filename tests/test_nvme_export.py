"""`userswap nvme export`, `discover`: whose a medium is, what outlives what, and what is said."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nvme import HOST, SUBSYSTEM
from nvme_socket import EndedError, Host, exporting
from userswap.backends.memory import MemoryStore
from userswap.backends.nvme_tcp import identify
from userswap.backends.nvme_tcp.discovery import REFERRAL, discover
from userswap.backends.nvme_tcp.server import Rules, serve
from userswap.backends.store import StoreFullError
from userswap.backends.volume import open_volume
from userswap.engine import cli
from userswap.engine.nvme_export import extent_name

PAGE = 4096


def answered(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any, str]:
    """Exit code, output (as JSON, where that was asked for) and messages of a command."""
    code = cli.main(list(arguments))
    shown = capsys.readouterr()
    return code, json.loads(shown.out) if "--json" in arguments else shown.out, shown.err


def test_what_a_medium_holds_is_there_when_it_is_exported_again(tmp_path: Path) -> None:
    medium = f"file:{tmp_path}/medium"
    other = f"{SUBSYSTEM}2"
    with exporting(medium) as (_, address, first), Host(address) as host:
        host.write(5, b"x" * PAGE)
        host.do_flush()
    with (
        exporting(medium, nqn=other) as (_, address, second),
        Host(address, subsystem=other) as host,
    ):
        assert host.read(5) == bytes(PAGE)
        host.write(5, b"y" * PAGE)
        host.do_flush()
    with exporting(medium, size="") as (child, address, again), Host(address) as host:
        assert host.read(5) == b"x" * PAGE
        host.write(6, b"z" * PAGE)
        child.kill()  # what was answered is the file's already
        child.wait()
        with pytest.raises((EndedError, OSError)):
            host.read(6)
        child.returncode = 0  # `exporting` wants it to end well
    with exporting(medium, size="64MiB") as (_, address, last), Host(address) as host:
        assert [host.read(at)[:1] for at in (5, 6)] == [b"x", b"z"]
    assert first["identity"] == again["identity"] == last["identity"] != second["identity"]
    assert first["durable"]


def test_what_ends_with_the_process_has_another_identity_each_time() -> None:
    with exporting("ram:lz4") as (_, _, first), exporting("ram:lz4") as (_, address, second):
        assert first["identity"] != second["identity"]
        assert not first["durable"]
        with Host(address) as host:
            page = host.namespace()
            assert page.nguid.hex() == second["identity"].replace("-", "")
            assert page.blocks * page.block_size == second["bytes"] == 64 << 20


def test_what_somebody_else_has_on_a_medium_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    medium = tmp_path / "disk"
    content = bytes(510) + b"\x55\xaa" + os.urandom(PAGE) * 4096
    medium.write_bytes(content)
    medium.chmod(0o600)
    command = ("nvme", "export", "--store", f"file:{medium}", "--size", "1MiB")
    code, _, said = answered(*command, "--listen", "127.0.0.1:0", capsys=capsys)
    assert (code, "boot sector or partition table" in said) == (1, True), said
    assert medium.read_bytes() == content


def test_a_size_that_differs_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    medium = f"file:{tmp_path}/medium"
    with exporting(medium) as (_, address, _), Host(address) as host:
        host.write(0, b"x" * PAGE)
    export = ("nvme", "export", "--store", medium, "--nqn", SUBSYSTEM, "--listen", "127.0.0.1:0")
    code, _, said = answered(*export, "--size", "32MiB", capsys=capsys)
    assert (code, "has 64MiB; leave --size out" in said) == (2, True), said
    forget = ("store", "list", medium, "--forget", SUBSYSTEM)
    assert f"`userswap {' '.join(forget)}`" in said

    # It makes room for nobody, and goes only when it is named.
    code, listed, _ = answered("store", "list", medium, "--reclaim", "--json", capsys=capsys)
    assert (code, [each["kept"] for each in listed["extents"]]) == (0, [True])
    assert listed["reclaimed"] == []
    code, shown, _ = answered("store", "list", medium, capsys=capsys)
    assert shown.rstrip().endswith("kept")
    with exporting(medium, size="") as (_, address, _), Host(address) as host:
        assert host.read(0) == b"x" * PAGE
    code, listed, _ = answered(*forget, "--json", capsys=capsys)
    assert (code, listed["extents"], len(listed["reclaimed"])) == (0, [], 1)
    code, _, said = answered(*forget, capsys=capsys)
    assert (code, "has nothing that was exported as" in said) == (1, True)
    code, _, said = answered(*export, capsys=capsys)
    assert (code, "how large" in said) == (2, True)


async def test_a_region_that_needs_room_takes_it_from_no_exported_namespace() -> None:
    store = MemoryStore(1000)
    volume = await open_volume(store, name="memory:")
    kept = await volume.allocate(SUBSYSTEM, 500)
    stale = await volume.allocate("heap", 300)
    volume = await open_volume(store, name="memory:")
    assert {extent.uuid for extent in volume.stale} == {kept.uuid, stale.uuid}
    with pytest.raises(StoreFullError, match="no room for"):
        await volume.allocate("large", 600)
    assert len(volume.stale) == 2
    await volume.allocate("other", 400)
    assert volume.stale == [kept]
    assert volume.adopt("heap") is None
    assert volume.adopt(SUBSYSTEM) == kept
    assert volume.adopt(SUBSYSTEM) is None


def test_a_long_nqn_has_an_extent_of_its_own() -> None:
    long = "nqn.2026-01.test:" + "x" * 200
    names = {extent_name(name) for name in (SUBSYSTEM, long, long + "y")}
    assert len(names) == 3
    assert all(len(name) <= 88 for name in names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--listen", "0.0.0.0:4420", "--size", "1MiB"], "--allow-host"),
        (["--listen", ":4420", "--size", "1MiB"], "every address can be reached"),
        (["--listen", "127.0.0.1:99999", "--size", "1MiB"], "is no address"),
        (["--listen", "::1", "--size", "1MiB"], "is no address"),
        (["--size", "1000"], "multiple of 4KiB"),
        (["--size", "0"], "multiple of 4KiB"),
        ([], "how large"),
        (["--size", "1MiB", "--nqn", "mine"], "is no NQN"),
        (["--size", "1MiB", "--nqn", identify.DISCOVERY_NQN], "is no NQN"),
        (["--size", "1MiB", "--allow-host", "you"], "is no NQN"),
        (["--size", "1MiB", "--queues", "0"], "--queues: use 1 to 64"),
        (["--size", "1MiB", "--connections", "1"], "--connections: use 2 or more"),
    ],
)
def test_what_cannot_be_asked_for(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, message = answered("nvme", "export", "--store", "ram:", *options, capsys=capsys)
    assert (code, said in message) == (2, True), message
    assert message.count("\n") == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        command = ("nvme", "export", "--store", "ram:", "--size", "1MiB", "--listen", where)
        code, _, said = answered(*command, capsys=capsys)
    assert (code, "already in use" in said) == (3, True), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(number: signal.Signals, tmp_path: Path) -> None:
    with exporting(f"file:{tmp_path}/medium") as (child, address, _), Host(address) as host:
        host.write(0, b"x" * PAGE)
        child.send_signal(number)
        _, errors = child.communicate(timeout=30)
        assert child.returncode == 0
        assert "ended, all of it flushed: 2 accepted, 1 write" in errors


def test_allowed_hosts_alone_connect() -> None:
    options = ("--listen", "127.0.0.1:0", "--allow-host", HOST, "--allow-host", HOST + "2")
    with exporting("ram:lz4", *options) as (_, address, _):
        for name in (HOST, HOST + "2"):
            with Host(address, name=name) as host:
                assert host.read(0) == bytes(PAGE)
        with pytest.raises(EndedError, match="invalid host"):
            Host(address, name=HOST + "3")


def test_discovery_leads_to_the_namespace(capsys: pytest.CaptureFixture[str]) -> None:
    with exporting("ram:lz4") as (_, (host, port), said):
        code, shown, _ = answered("nvme", "discover", f"{host}:{port}", capsys=capsys)
        assert (code, shown.split()) == (0, ["subsystem", said["url"]])
        command = ("nvme", "discover", "--json", f"{host}:{port}")
        code, shown, _ = answered(*command, capsys=capsys)
        assert [entry["url"] for entry in shown["entries"]] == [said["url"]]
        assert shown["asked"] == [{"address": f"{host}:{port}", "problem": None}]
    code, _, message = answered("nvme", "discover", f"{host}:{port}", capsys=capsys)
    assert (code, message.count("\n")) == (1, 1)
    assert f"discovery at {host}:{port}: Connection refused" in message


async def test_a_discovery_that_is_refused_says_so() -> None:
    rules = Rules(hosts=frozenset({HOST}))
    async with await serve(
        MemoryStore(16), nqn=SUBSYSTEM, listen=("127.0.0.1", 0), rules=rules
    ) as server:
        where = "{}:{}".format(*server.address)
        command = [sys.executable, "-m", "userswap", "nvme", "discover", where]
        run = functools.partial(subprocess.run, capture_output=True, text=True)
        refused = await asyncio.to_thread(run, command)
        asked = await asyncio.to_thread(run, [*command, "--hostnqn", HOST])
    assert (refused.returncode, "does not let this host in, which is nqn." in refused.stderr) == (
        1,
        True,
    ), refused
    assert (asked.returncode, SUBSYSTEM in asked.stdout) == (0, True), asked


async def test_an_ipv6_address_is_discovered_as_one() -> None:
    async with await serve(MemoryStore(16), nqn=SUBSYSTEM, listen=("::1", 0)) as server:
        (log,) = await discover(server.address)
        (entry,) = log.entries
        assert (entry.address, entry.family) == ("::1", identify.IPV6)
        assert entry.service == str(server.address[1])


def test_a_store_over_there_passes_the_contract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with exporting(f"file:{tmp_path}/medium", "--listen", "127.0.0.1:0", "--block-size", "512") as (
        _,
        _,
        said,
    ):
        _, shown, _ = answered("store", "check", said["url"], "--json", capsys=capsys)
    failed = {each["check"] for each in shown["checks"] if each["result"] == "failed"}
    # NVMe lets hosts share a namespace.
    assert failed <= {"opened by one at a time"}
    assert len(shown["checks"]) > 15


async def test_referrals_are_followed_once() -> None:
    """Two targets that refer to each other, and to nobody."""
    store = MemoryStore(16)
    async with (
        await serve(store, nqn=SUBSYSTEM, listen=("127.0.0.1", 0)) as one,
        await serve(store, nqn=SUBSYSTEM + "2", listen=("127.0.0.1", 0)) as two,
    ):
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            closed = nobody.getsockname()[1]
        for server, others in ((one, (two.address[1], closed)), (two, (one.address[1],))):
            entries = [identify.Entry(server.nqn, "127.0.0.1", str(server.address[1]))]
            entries += [
                identify.Entry(identify.DISCOVERY_NQN, "127.0.0.1", str(port), subtype=REFERRAL)
                for port in others
            ]
            log = identify.pack_log(1, entries)
            server.target._log = lambda listens, log=log: log  # type: ignore[method-assign,misc]
        logs = await asyncio.wait_for(discover(one.address), 30)
    assert [log.address for log in logs] == [one.address, two.address, ("127.0.0.1", closed)]
    assert [bool(log.problem) for log in logs] == [False, False, True]
    assert [entry.subsystem for entry in logs[1].entries if entry.subtype == 2] == [SUBSYSTEM + "2"]
