"""Layouts and digests of NVMe/TCP, against what was seen on the wire."""

import random

import pytest

from userswap.backends.nvme_tcp import identify, pdu
from userswap.backends.nvme_tcp.command import (
    DO_NOT_RETRY,
    SGL_IN_CAPSULE,
    SQE,
    Connect,
    Log,
    Sqe,
    Status,
    blocks_of,
    code_of,
    get_log,
    read,
    retryable,
    status_name,
)
from userswap.backends.nvme_tcp.pdu import Framing, PduType
from userswap.native import ffi, lib

VECTORS = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),  # RFC 3720, B.4, and the next two
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
]


@pytest.mark.parametrize(("data", "crc"), VECTORS)
def test_crc32c_of_known_data(data: bytes, crc: int) -> None:
    assert pdu.crc32c(data) == crc
    assert lib.us_crc32c_tables(0, ffi.from_buffer(data), len(data)) == crc


def test_crc32c_by_instruction_and_by_tables_in_any_pieces() -> None:
    rng = random.Random(1)
    for _ in range(300):
        data = memoryview(rng.randbytes(rng.randrange(rng.choice((100, 10000)))))
        start, middle = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        part = data[start:]
        expected = lib.us_crc32c_tables(0, ffi.from_buffer(part), len(part))
        assert pdu.crc32c(part) == expected
        assert pdu.crc32c(data[middle:], pdu.crc32c(data[start:middle])) == expected


def test_a_pdu_is_padded_and_digested() -> None:
    framing = Framing(header_digest=True, data_digest=True, alignment=64)
    head, data, trailer = map(bytes, framing.frame(PduType.C2H_DATA, 4, bytes(16), b"abc"))
    kind, flags, hlen, pdo, plen = pdu.COMMON.unpack_from(head)
    assert (kind, flags, hlen, pdo, plen) == (PduType.C2H_DATA, 4 | 1 | 2, 24, 64, 64 + 3 + 4)
    assert head[24:28] == pdu.digest(head[:24])
    assert head[28:] == bytes(64 - 28)
    assert (data, trailer) == (b"abc", pdu.digest(b"abc"))


def test_a_capsule_with_a_header_digest_has_its_data_at_76() -> None:
    head, _ = Framing(header_digest=True).frame(PduType.CAPSULE_CMD, 0, bytes(64), b"x")
    assert pdu.COMMON.unpack_from(head)[2:] == (72, 76, 77)


def test_ic_req_is_128_bytes() -> None:
    request = pdu.init(PduType.IC_REQ, alignment=0, digests=3, limit=5)
    assert request == bytes([0, 0, 128, 0, 128, 0, 0, 0, 0, 0, 0, 3, 5]).ljust(128, b"\0")


def test_a_command_at_its_offsets() -> None:
    entry = read(7, 0x1_0000_0002, 3).entry(0x1234, 0x3000, SGL_IN_CAPSULE)
    expected = bytearray(64)
    expected[0:2] = 2, 0x40
    expected[2:4] = 0x34, 0x12
    expected[4] = 7
    expected[33] = 0x30
    expected[39] = 1
    expected[40], expected[44], expected[48] = 2, 1, 2
    assert entry == bytes(expected)
    assert blocks_of(Sqe._make(SQE.unpack(entry)).dwords()) == (0x1_0000_0002, 3)


def test_get_log_counts_dwords_from_zero() -> None:
    assert get_log(Log.DISCOVERY, 1024).dwords()[:2] == (0x70 | 255 << 16, 0)


def test_connect_there_and_back() -> None:
    connect = Connect("nqn.s", "nqn.h", bytes(range(16)), 3, 128, 9, 5000, flow_control=False)
    assert connect.command().dwords()[:3] == (3 << 16, 127 | 4 << 16, 5000)
    assert len(connect.data()) == 1024
    assert Connect.parse(connect.command(), memoryview(connect.data())) == connect


def test_identify_there_and_back() -> None:
    controller = identify.Controller(
        "1", "model", "2", 7, 128 * 1024, 8192, 5, 4, True, 1, 64, "nqn.s"
    )
    assert identify.Controller.parse(controller.pack()) == controller
    namespace = identify.Namespace(77, 512, bytes(range(16)))
    assert identify.Namespace.parse(namespace.pack()) == namespace
    assert identify.Namespace.parse(bytearray(4096)) is None
    assert identify.parse_active(identify.pack_active({5, 3, 9}, 3)) == [5, 9]
    entry = identify.Entry("nqn.s", "127.0.0.1", "4420")
    assert identify.Entry.parse(entry.pack()) == entry


def test_status_has_names_and_tells_whether_to_try_again() -> None:
    assert status_name(Status.LBA_OUT_OF_RANGE | DO_NOT_RETRY) == "lba out of range (0/80h)"
    assert status_name(0x7FF) == "status (7/ffh)"
    assert code_of(0x7FFF) == 0x7FF
    assert not retryable(0)
    assert retryable(Status.TRANSIENT_TRANSPORT)
    assert not retryable(Status.INVALID_FIELD | DO_NOT_RETRY)
    assert retryable(Status.PATH_ERROR | DO_NOT_RETRY)
