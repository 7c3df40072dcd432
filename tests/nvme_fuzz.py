"""Fuzz both ends of NVMe over TCP: `python tests/nvme_fuzz.py --inputs 1000000 --seed 1`.

An input is a stream of PDUs that begins well and is then mutated: bits, bytes, whole fields, PDUs
left out, doubled, spliced or made of random fields. It is cut at random places. Whatever comes:
 - an end gives events, or one RemoteProtocolError (or the peer's TermReq) in the event that ends
   it; no other exception comes out;
 - nothing is written beyond the buffers of the commands that were submitted, nor into that of a
   command that was completed or abandoned, nor into any after the end;
 - a read that succeeded has all its data, a write brings all of it;
 - each command is completed once, or listed once among the unfinished;
 - the host's queue in C and the one in Python tell, send and write the same;
 - a target's operations fit its namespace, and what it holds in memory stays within its limits.
"""

import argparse
import random
import time

from nvme import BLOCKS, World, with_digests
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp import pdu
from userswap.backends.nvme_tcp.command import CQE, Connect, Io
from userswap.backends.nvme_tcp.native_queue import NativeQueuePair
from userswap.backends.nvme_tcp.pdu import (
    LAST,
    SUCCESS,
    TRANSFER,
    ConnectionLostError,
    Framing,
    PduType,
    RemoteProtocolError,
)
from userswap.backends.nvme_tcp.qpair import (
    Completed,
    Connected,
    Event,
    QueuePair,
    State,
    Terminated,
)
from userswap.backends.nvme_tcp.target import Operation, Rules, Session
from userswap.backends.nvme_tcp.target_controller import TargetController
from userswap.backends.nvme_tcp.target_queue import Closed, Limits

CONNECT = Connect("nqn.s", "nqn.h", bytes(16), queue=1, entries=16, controller=1)
BLOCK = 512
GUARD = 64
FORMS = [Framing(header, data) for header in (False, True) for data in (False, True)]
RULES = Rules(limits=Limits(in_capsule=8192, transfer=16384, maxh2cdata=4096, asked=20000))
INTERESTING = (0, 1, 2, 3, 4, 8, 16, 23, 24, 25, 28, 72, 76, 127, 128, 255, 512, 1024, 4096)
WIDE = (0, 1, 24, 28, 512, 1024, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Rng = random.Random
Pdus = list[bytes]


def raw(kind: PduType, flags: int, body: bytes, data: bytes, form: Framing) -> bytes:
    return b"".join(map(bytes, form.frame(kind, flags, body, data)))


def misplaced(rng: Rng, fields: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The CID, tag, offset and length of a transfer; one in six is wrong, in a well-formed PDU."""
    cid, tag, offset, length = fields
    match rng.randrange(24):
        case 0:
            return rng.randrange(8), tag, offset, length
        case 1:
            return cid, rng.randrange(8), offset, length
        case 2:
            return cid, tag, max(offset + rng.choice((-512, -4, 4, 512, 1 << 31)), 0), length
        case 3:
            return cid, tag, offset, max(length + rng.choice((-512, -4, 4, 512, 4096)), 0)
    return fields


def redigest(packet: bytearray, form: Framing) -> None:
    """Make the header's digest right again, so that what was changed is looked at."""
    hlen = packet[2] if len(packet) > 2 else 0
    if form.header_digest and 8 <= hlen <= len(packet) - 4:
        packet[hlen : hlen + 4] = pdu.digest(bytes(packet[:hlen]))


def mutate(rng: Rng, pdus: Pdus, form: Framing) -> bytes:
    pdus = list(pdus)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
        if not pdus:
            break
        at = rng.randrange(len(pdus))
        packet = bytearray(pdus[at])
        match rng.randrange(8):
            case 0 if packet:
                packet[rng.randrange(len(packet))] ^= 1 << rng.randrange(8)
            case 1 if packet:
                packet[rng.randrange(min(len(packet), 72))] = rng.choice(INTERESTING) & 0xFF
                redigest(packet, form)
            case 2 if len(packet) >= 24:
                field = rng.choice((4, 8, 12, 16, 20))
                packet[field : field + 4] = rng.choice(WIDE).to_bytes(4, "little")
                redigest(packet, form)
            case 3:
                del pdus[at]
                continue
            case 4:
                pdus.insert(at, pdus[at])
            case 5:
                packet = packet[: rng.randrange(len(packet) + 1)]
            case 6:
                packet += rng.randbytes(rng.choice(INTERESTING))
            case _:
                other = rng.randrange(len(pdus))
                pdus[at], pdus[other] = pdus[other], pdus[at]
                continue
        pdus[at] = bytes(packet)
    return b"".join(pdus)


def pieces(rng: Rng, stream: bytes) -> Pdus:
    cuts = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.choice((0, 0, 1, 3, 9))))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


# --- the host ---


class Buffers:
    """Read buffers in one piece of memory, with guards between them."""

    def __init__(self, sizes: list[int]) -> None:
        self.memory = bytearray(b"\xa5" * (sum(sizes) + GUARD * (len(sizes) + 1)))
        self.places: list[slice] = []
        at = GUARD
        for size in sizes:
            self.places.append(slice(at, at + size))
            at += size + GUARD

    def view(self, number: int) -> memoryview:
        return memoryview(self.memory)[self.places[number]]

    def seal(self, number: int) -> None:
        """Nothing may come into this one any more."""
        self.memory[self.places[number]] = b"\xa5" * len(self.view(number))

    def check(self) -> None:
        rest = bytearray(self.memory)
        for place in reversed(self.places):
            del rest[place]
        assert rest.count(0xA5) == len(rest), "bytes beyond the buffers"

    def sealed(self, number: int) -> bool:
        view = self.view(number)
        return bytes(view).count(0xA5) == len(view)


def host_pdus(rng: Rng, sizes: list[int], writes: list[int], form: Framing) -> Pdus:
    """What a target might send: reads are CID 1 and up, the writes follow, then a flush."""
    pdus: Pdus = []
    for cid, size in enumerate(sizes, 1):
        middle = rng.choice((0, size // 2, size // 4))
        alone = rng.random() < 0.3
        for at, end in ((0, middle), (middle, size)):
            if at < end:
                flags = 0 if end < size else LAST | SUCCESS if alone else LAST
                fields = misplaced(rng, (cid, 0, at, end - at))
                data = b"d" * fields[3]
                pdus.append(raw(PduType.C2H_DATA, flags, TRANSFER.pack(*fields), data, form))
        if not alone:
            pdus.append(raw(PduType.CAPSULE_RESP, 0, CQE.pack(0, 1, 1, cid, 0), b"", form))
    for cid, size in enumerate(writes, len(sizes) + 1):
        if size > 8192:
            body = TRANSFER.pack(*misplaced(rng, (cid, 9, 0, size)))
            pdus.append(raw(PduType.R2T, 0, body, b"", form))
        pdus.append(raw(PduType.CAPSULE_RESP, 0, CQE.pack(0, 1, 1, cid, 0), b"", form))
    flush = len(sizes) + len(writes) + 1
    pdus.append(raw(PduType.CAPSULE_RESP, 0, CQE.pack(0, 1, 1, flush, 0x4004), b"", form))
    return pdus


class Twins:
    """A queue in C and one in Python that are given the same: what either does, both have to."""

    def __init__(self, form: Framing) -> None:
        options = with_digests(form.header_digest, form.data_digest)
        self.native = NativeQueuePair(CONNECT, options, 0.0)
        self.plain = QueuePair(CONNECT, options, 0.0)
        self.buffers, self.plain_buffers = Buffers([]), Buffers([])

    def submit(self, command: nvme.Command, *, data: bytes | None = None, into: int = -1) -> int:
        """`into` is the number of a buffer."""
        views = [
            None if into < 0 else buffers.view(into)
            for buffers in (self.buffers, self.plain_buffers)
        ]
        cid = self.native.submit(command, 0.0, data=data, into=views[0])
        assert cid == self.plain.submit(command, 0.0, data=data, into=views[1])
        return cid

    def abandon(self, cid: int) -> None:
        self.native.abandon(cid)
        self.plain.abandon(cid)

    def receive_data(self, part: bytes) -> list[Event]:
        events = self.native.receive_data(part, 0.0)
        told = [repr(event) for event in self.plain.receive_data(part, 0.0)]
        found = [repr(event) for event in events]
        assert found == told, (found, told)
        assert self.buffers.memory == self.plain_buffers.memory
        assert self.native.direct == (self.native.state is State.RUNNING), "back in Python"
        return events

    def data_to_send(self) -> None:
        sent = b"".join(map(bytes, self.native.data_to_send()))
        assert sent == b"".join(map(bytes, self.plain.data_to_send()))

    def seal(self, cids: set[int]) -> None:
        for cid in cids:
            self.buffers.seal(cid - 1)
            self.plain_buffers.seal(cid - 1)


def fuzz_host(rng: Rng) -> str:
    form = rng.choice(FORMS)
    digests = form.header_digest + 2 * form.data_digest
    queue = Twins(form)
    queue.data_to_send()
    hello = [pdu.init(PduType.IC_RESP, alignment=0, digests=digests, limit=4096)]
    hello.append(raw(PduType.CAPSULE_RESP, 0, CQE.pack(7, 1, 1, 0, 0), b"", form))
    if rng.random() < 0.1:
        events = queue.native.receive_data(mutate(rng, hello, form), 0.0)
        return outcome(events, set())
    events = queue.native.receive_data(b"".join(hello), 0.0)
    assert events == queue.plain.receive_data(b"".join(hello), 0.0) == [Connected(7)]
    queue.data_to_send()
    sizes = [rng.choice((512, 1024, 1500, 4096)) for _ in range(rng.randrange(1, 4))]
    writes = [rng.choice((512, 8192, 9000)) for _ in range(rng.randrange(3))]
    buffers, queue.plain_buffers = Buffers(sizes), Buffers(sizes)
    queue.buffers = buffers
    open_cids = set()
    for number, size in enumerate(sizes):
        open_cids.add(queue.submit(nvme.read(1, 0, size // BLOCK), into=number))
    for size in writes:
        open_cids.add(queue.submit(nvme.write(1, 0, 1), data=rng.randbytes(size)))
    open_cids.add(queue.submit(nvme.flush(1)))
    stream = mutate(rng, host_pdus(rng, sizes, writes, form), form)
    reads = set(range(1, len(sizes) + 1))
    closed: set[int] = set()
    told = "quiet"
    for part in pieces(rng, stream):
        if rng.random() < 0.05 and (left := sorted(open_cids)):
            cid = rng.choice(left)
            queue.abandon(cid)
            closed |= {cid} & reads
            queue.seal(closed)
        events = queue.receive_data(part)
        told = outcome(events, open_cids)
        for event in events:
            if isinstance(event, Completed) and not event.status and event.cid in reads:
                missing = bytes(buffers.view(event.cid - 1)).count(0xA5)
                assert event.cid in closed or missing < BLOCK // 2, "a read without all its data"
        assert all(buffers.sealed(cid - 1) for cid in closed), "bytes in a buffer given back"
        ended = {e.cid for e in events if isinstance(e, Completed)}
        closed |= reads if told == "ended" else ended & reads
        queue.seal(closed)
        buffers.check()
        if rng.random() < 0.5:
            queue.data_to_send()
    queue.data_to_send()
    return told if queue.native.error is None else "ended"


def outcome(events: list, open_cids: set[int]) -> str:  # type: ignore[type-arg]
    """Account for the commands that the events name."""
    for event in events:
        match event:
            case Completed(cid):
                assert cid in open_cids, f"{cid} completed, but not outstanding"
                open_cids.remove(cid)
            case Terminated(error, unfinished):
                assert isinstance(error, RemoteProtocolError | ConnectionLostError)
                assert set(unfinished) == open_cids
                assert event is events[-1]
                open_cids.clear()
                return "ended"
            case _:
                assert isinstance(event, Connected)
    return "events" if events else "quiet"


# --- the target ---


def target_pdus(rng: Rng, form: Framing, admin: bool) -> Pdus:
    """What a host might send after Connect."""
    pdus: Pdus = []
    for cid in range(1, rng.randrange(2, 7)):
        count = rng.choice((1, 2, 16, 20))
        size = count * BLOCK
        first = rng.randrange(BLOCKS - count)
        if admin:
            pdus.append(admin_pdu(rng, cid, form))
            continue
        match rng.randrange(5):
            case 0:
                entry = nvme.read(1, first, count).entry(cid, size)
                pdus.append(raw(PduType.CAPSULE_CMD, 0, entry, b"", form))
            case 1 if size <= 8192:
                entry = nvme.write(1, first, count).entry(cid, size, nvme.SGL_IN_CAPSULE)
                pdus.append(raw(PduType.CAPSULE_CMD, 0, entry, b"w" * size, form))
            case 2:
                discard, ranges = nvme.deallocate(1, [(first, count), (first, 1)])
                entry = discard.entry(cid, len(ranges), nvme.SGL_IN_CAPSULE)
                pdus.append(raw(PduType.CAPSULE_CMD, 0, entry, ranges, form))
            case 3:
                entry = rng.choice((nvme.flush(1), nvme.write_zeroes(1, first, count))).entry(cid)
                pdus.append(raw(PduType.CAPSULE_CMD, 0, entry, b"", form))
            case _:
                entry = nvme.write(1, first, count).entry(cid, size)
                pdus.append(raw(PduType.CAPSULE_CMD, 0, entry, b"", form))
                for at in range(0, size, 4096):
                    part = min(4096, size - at)
                    flags = LAST if at + part == size else 0
                    fields = misplaced(rng, (cid, cid, at, part))
                    data = b"w" * fields[3]
                    pdus.append(raw(PduType.H2C_DATA, flags, TRANSFER.pack(*fields), data, form))
    return pdus


def admin_pdu(rng: Rng, cid: int, form: Framing) -> bytes:
    command, length = rng.choice(
        (
            (nvme.identify(rng.choice(tuple(nvme.Cns)), rng.choice((0, 1, 2, 99))), 4096),
            (nvme.get_log(rng.choice(tuple(nvme.Log)), 512), 512),
            (nvme.set_features(rng.choice(tuple(nvme.Feature)), 1 << 8), 0),
            (nvme.property_set(nvme.Property.CC, rng.choice((0, nvme.CC_ENABLE))), 0),
            (nvme.property_get(rng.choice(tuple(nvme.Property))), 0),
            (nvme.KEEP_ALIVE, 0),
            (nvme.ASYNC_EVENT, 0),
        )
    )
    return raw(PduType.CAPSULE_CMD, 0, command.entry(cid, length), b"", form)


def joined(world: World, form: Framing, queue: int) -> Session:
    """A connection that is that queue of a controller, by the back door: fuzzing is quicker so."""
    session = world.target.accept(0.0)
    digests = form.header_digest + 2 * form.data_digest
    session.receive_data(pdu.init(PduType.IC_REQ, alignment=0, digests=digests, limit=0), 0.0)
    connect = Connect(world.target.nqn, "nqn.h", bytes(16), queue=queue, entries=16)
    controller = TargetController(1, connect, world.target.identity(world.target.nqn), 0.0)
    enable = nvme.property_set(nvme.Property.CC, nvme.CC_ENABLE).entry(0)
    controller.answer(nvme.Sqe._make(nvme.SQE.unpack(enable)))
    world.target.controllers[1] = controller
    session.controller = controller
    session.queue.connected(queue, 16, True)
    return session


def check_limits(session: Session) -> None:
    queue = session.queue
    assert len(queue._pending) <= queue.entries
    asked = sum(pending.asked for pending in queue._pending.values())
    assert asked == queue._asked <= RULES.limits.asked


def fuzz_target(rng: Rng, world: World) -> str:
    form = rng.choice(FORMS)
    number = rng.choice((0, 1, 1))
    if rng.random() < 0.1:
        session = world.target.accept(0.0)
        connect = Connect(world.target.nqn, "nqn.h", bytes(16))
        hello = [pdu.init(PduType.IC_REQ, alignment=0, digests=0, limit=0)]
        entry = connect.command().entry(0, 1024, nvme.SGL_IN_CAPSULE)
        hello.append(raw(PduType.CAPSULE_CMD, 0, entry, connect.data(), pdu.PLAIN))
        stream = mutate(rng, hello, pdu.PLAIN)
    else:
        session = joined(world, form, number)
        stream = mutate(rng, target_pdus(rng, form, number == 0), form)
    told = "quiet"
    held: list[Operation] = []
    for part in pieces(rng, stream):
        for event in session.receive_data(part, 0.0):
            if isinstance(event, Closed):
                assert isinstance(event.error, RemoteProtocolError | ConnectionLostError)
                told = "ended"
                held.clear()
                continue
            told = "events"
            for first, count in event.ranges:
                assert 0 <= first <= first + count <= BLOCKS
            if event.kind == Io.WRITE:
                assert len(event.data) == event.ranges[0][1] * BLOCK
                assert bytes(event.data).count(0) < BLOCK // 2, "a write without all its data"
            held.append(event)
        check_limits(session)
        while held and rng.random() < 0.7:
            operation = held.pop(rng.randrange(len(held)))
            size = operation.ranges[0][1] * BLOCK if operation.kind == Io.READ else 0
            session.complete(operation, 0, bytes(size))
        session.data_to_send()
    session.close("enough")
    world.target.touched.clear()
    assert not world.target.sessions
    return told


def fuzz(inputs: int, seed: int) -> dict[str, int]:
    """Run that many inputs, half of them for each end; how they ended, by number."""
    world = World(rules=RULES)
    world.target.namespaces[1] = type(world.medium)(BLOCK, BLOCKS).namespace
    found: dict[str, int] = {}
    for number in range(inputs):
        rng = random.Random(f"{seed}/{number}")
        end = "host" if number % 2 else "target"
        try:
            told = fuzz_host(rng) if number % 2 else fuzz_target(rng, world)
        except BaseException:
            print(f"seed {seed}, input {number} ({end})")
            raise
        found[f"{end} {told}"] = found.get(f"{end} {told}", 0) + 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    print(f"{given.inputs} inputs, seed {given.seed}", flush=True)
    began = time.monotonic()
    for ending, number in sorted(fuzz(given.inputs, given.seed).items()):
        print(f"{ending:16} {number}")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
