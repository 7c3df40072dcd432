"""What Wireshark's dissector makes of NVMe/TCP: captures written and read, and asked of tshark.

The capture is cut into PDUs here too, by their lengths alone: the dissector has to have found the
same ones, in the same order, whole, and with digests that are right.
"""

from __future__ import annotations

import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct

from packages import provide
from userswap.backends.nvme_tcp.pdu import COMMON

FILE = Struct("<IHHiIII")
RECORD = Struct("<IIII")
ETHERNET, RAW_IPV4 = 1, 228
IPV4 = Struct("!BBHHHBBH4s4s")
TCP = Struct("!HHIIBBHHH")
SYN, ACK, PUSH = 2, 16, 8
SEGMENT = 1400
Address = tuple[bytes, int]
Way = tuple[Address, Address]
Pdu = tuple[int, int]  # type, PLEN


def write_capture(path: Path, port: int, parts: Iterable[tuple[bool, bytes]]) -> None:
    """A connection to `port`, of parts that went to the target (True) or came from there."""
    host, target = (b"\x7f\0\0\1", 40000), (b"\x7f\0\0\2", port)
    said = {host: 1, target: 1}
    with path.open("wb") as file:
        file.write(FILE.pack(0xA1B2C3D4, 2, 4, 0, 0, 65536, RAW_IPV4))

        def packet(source: Address, destination: Address, flags: int, data: bytes) -> None:
            number = said[source] - (1 if flags & SYN else 0)
            seen = said[destination] if flags & ACK else 0
            tcp = TCP.pack(source[1], destination[1], number, seen, 80, flags, 8192, 0, 0)
            length = IPV4.size + TCP.size + len(data)
            ip = IPV4.pack(69, 0, length, 0, 0, 64, 6, 0, source[0], destination[0])
            file.write(RECORD.pack(0, 0, length, length) + ip + tcp + data)
            said[source] += len(data)

        packet(host, target, SYN, b"")
        packet(target, host, SYN | ACK, b"")
        for up, data in parts:
            ends = (host, target) if up else (target, host)
            for at in range(0, len(data), SEGMENT):
                packet(*ends, ACK | PUSH, data[at : at + SEGMENT])


def read_capture(path: Path) -> list[dict[Way, bytes]]:
    """The connections that it has, in order: what went each way."""
    whole = path.read_bytes()
    link = FILE.unpack_from(whole)[6]
    at = FILE.size
    connections: list[dict[Way, bytearray]] = []
    latest: dict[frozenset[Address], dict[Way, bytearray]] = {}
    starts: dict[tuple[int, Way], int] = {}
    while at < len(whole):
        size = RECORD.unpack_from(whole, at)[2]
        frame = whole[at + RECORD.size : at + RECORD.size + size]
        at += RECORD.size + size
        if link == ETHERNET:
            if frame[12:14] != b"\x08\0":
                continue
            frame = frame[14:]
        if frame[9] != 6:
            continue
        length = int.from_bytes(frame[2:4], "big")
        begin = (frame[0] & 15) * 4
        source_port, port, sequence, _, offset, flags, *_ = TCP.unpack_from(frame, begin)
        way = (frame[12:16], source_port), (frame[16:20], port)
        ends = frozenset(way)
        if flags & SYN and (ends not in latest or not flags & ACK):
            latest[ends] = {}
            connections.append(latest[ends])
        if ends not in latest:
            continue
        number = id(latest[ends])
        if flags & SYN:
            starts[number, way] = sequence + 1
        data = frame[begin + (offset >> 4) * 4 : length]
        if data:
            stream = latest[ends].setdefault(way, bytearray())
            place = (sequence - starts[number, way]) & 0xFFFFFFFF
            stream[place : place + len(data)] = data
    return [{way: bytes(data) for way, data in found.items()} for found in connections]


def pdus(stream: bytes) -> list[Pdu]:
    """By their lengths; what the end of the capture cut off is left out."""
    found = []
    at = 0
    while at + COMMON.size <= len(stream):
        kind, _, _, _, plen = COMMON.unpack_from(stream, at)
        at += plen
        if at <= len(stream):
            found.append((kind, plen))
    return found


@dataclass
class Dissection:
    """What tshark says of all connections."""

    pdus: dict[tuple[int, int], list[Pdu]] = field(default_factory=lambda: defaultdict(list))
    """by number of the connection and source port"""
    complaints: list[str] = field(default_factory=list)
    digests: Counter[str] = field(default_factory=Counter)
    """how many were found right ("Good"), and not"""


FIELDS = (
    *("frame.number", "tcp.stream", "tcp.srcport", "nvme-tcp.type", "nvme-tcp.plen"),
    *("nvme-tcp.hdgst.status", "nvme-tcp.ddgst.status", "_ws.malformed", "_ws.expert.message"),
)


def dissect(path: Path, ports: set[int]) -> Dissection:
    """Targets are at these ports."""
    provide({"tshark": "tshark"})
    command = ["tshark", "-r", str(path), "-T", "fields"]
    for port in sorted(ports):
        command += ["-d", f"tcp.port=={port},nvme-tcp"]
    command += ["-o", "nvme-tcp.check_hdgst:TRUE", "-o", "nvme-tcp.check_ddgst:TRUE"]
    command += ["-Y", "nvme-tcp || _ws.malformed", "-E", "occurrence=a", "-E", "aggregator=,"]
    for name in FIELDS:
        command += ["-e", name]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = Dissection()
    for line in said.splitlines():
        frame, stream, source, kinds, lengths, header, data, malformed, expert = line.split("\t")
        if malformed or "alformed" in expert:
            found.complaints.append(f"frame {frame}: {malformed} {expert}")
        for statuses in (header, data):
            found.digests.update(filter(None, statuses.split(",")))
        numbers = [int(kind, 0) for kind in kinds.split(",") if kind]
        sizes = [int(length, 0) for length in lengths.split(",") if length]
        found.pdus[int(stream), int(source)] += zip(numbers, sizes, strict=True)
    return found
