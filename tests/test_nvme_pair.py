"""Host and target paired in memory: every script gives the same however the bytes are cut."""

import itertools
from collections.abc import Callable

import pytest

from nvme import (
    MEDIUM_ERROR,
    SUBSYSTEM,
    Cut,
    Link,
    Medium,
    World,
    at_random,
    settings,
    single,
    whole,
    with_digests,
)
from userswap.backends.nvme_tcp import command as nvme
from userswap.backends.nvme_tcp import controller as host
from userswap.backends.nvme_tcp import identify
from userswap.backends.nvme_tcp.command import DO_NOT_RETRY, Connect, Status
from userswap.backends.nvme_tcp.pdu import LocalProtocolError
from userswap.backends.nvme_tcp.qpair import (
    Completed,
    ConnectRefusedError,
    QueuePair,
    Terminated,
)
from userswap.backends.nvme_tcp.target import Operation, RefusedError, Rules
from userswap.backends.nvme_tcp.target_queue import Limits

pytestmark = pytest.mark.usefixtures("queue_type")

CUTS: list[tuple[str, Callable[[], Cut]]] = [
    ("whole", lambda: whole),
    ("single", lambda: single),
    *((f"seed {seed}", lambda seed=seed: at_random(seed)) for seed in range(3)),
]
SMALL = Rules(limits=Limits(maxh2cdata=4096, asked=16 * 1024, transfer=32 * 1024))
FORMS = list(itertools.product((False, True), (False, True), (False, True), (512, 4096)))


def pattern(size: int, seed: int = 1) -> bytes:
    return bytes((at * 7 + seed * 13 + at // 251) & 0xFF for at in range(size))


def transfer(queue: QueuePair, link: Link, size: int) -> tuple[list[object], bytes]:
    """Write by capsule and by R2T, read back, zero, discard, flush; and fail in between."""
    blocks = size // link.medium.block_size
    told: list[object] = []
    into = memoryview(bytearray(size * 2))
    queue.submit(nvme.write(1, 0, blocks), 0.0, data=pattern(size))
    queue.submit(nvme.write(1, blocks, blocks, fua=True), 0.0, data=memoryview(pattern(size, 2)))
    told += link.run()
    queue.submit(nvme.read(1, 0, blocks), 0.0, into=into[:size])
    queue.submit(nvme.read(1, blocks, blocks), 0.0, into=into[size:])
    queue.submit(nvme.read(1, link.medium.blocks, 1), 0.0, into=memoryview(bytearray(size)))
    queue.submit(nvme.flush(1), 0.0)
    told += link.run()
    found = bytes(into)
    queue.submit(nvme.write_zeroes(1, 0, 1), 0.0)
    discard, ranges = nvme.deallocate(1, [(blocks, 1), (blocks + 1, 0)])
    queue.submit(discard, 0.0, data=ranges)
    queue.submit(nvme.read(9, 0, blocks), 0.0, into=into[:size])
    told += link.run()
    queue.submit(nvme.read(1, 0, blocks), 0.0, into=into[:size])
    told += link.run()
    return told, found + bytes(into[:size])


@pytest.mark.parametrize(("header", "data", "flow_control", "block_size"), FORMS)
def test_any_cut_gives_the_same(
    header: bool, data: bool, flow_control: bool, block_size: int
) -> None:
    wanted = settings(options=with_digests(header, data), flow_control=flow_control)
    results = []
    for _, cut in CUTS:
        world = World(Medium(block_size), SMALL, cut())
        queue, link = world.queue(wanted)
        told, found = transfer(queue, link, 12 * 1024)
        results.append((told, found, bytes(link.to_target), bytes(link.to_host)))
        assert found[: 24 * 1024] == pattern(12 * 1024) + pattern(12 * 1024, 2)
        assert found[24 * 1024 :] == bytes(block_size) + pattern(12 * 1024)[block_size:]
        statuses = [event.status for event in told if isinstance(event, Completed)]
        assert [status for status in statuses if status] == [
            Status.SGL_LENGTH_INVALID | DO_NOT_RETRY,
            Status.PATH_ERROR,
        ]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("cut", [cut for _, cut in CUTS], ids=[name for name, _ in CUTS])
def test_bring_up_and_shutdown(cut: Callable[[], Cut]) -> None:
    world = World(cut=cut())
    controller, link = world.ready(settings(queues=3))
    ready = controller.ready
    assert ready is not None
    assert (ready.queues, ready.entries) == (3, 128)
    assert ready.namespace == world.medium.namespace
    assert ready.controller.subsystem == SUBSYSTEM
    controller.shutdown(0.0)
    assert link.run() == [host.ShutDown()]
    assert controller.queue.error is not None


@pytest.mark.parametrize("cut", [cut for _, cut in CUTS], ids=[name for name, _ in CUTS])
def test_discovery(cut: Callable[[], Cut]) -> None:
    world = World(cut=cut())
    controller, link = world.controller(settings(subsystem=identify.DISCOVERY_NQN))
    (found,) = link.run()
    assert found == host.Discovered((identify.Entry(SUBSYSTEM, "127.0.0.1", "4420"),))
    assert controller.ready is None


@pytest.mark.parametrize("cut", [cut for _, cut in CUTS], ids=[name for name, _ in CUTS])
def test_a_namespace_goes_and_returns(cut: Callable[[], Cut]) -> None:
    world = World(cut=cut())
    _, link = world.ready()
    namespace = world.target.namespaces[1]
    world.target.set_namespace(1, None)
    assert world.target.touched == {link.session}
    assert link.run() == [host.NamespaceChanged(None)]
    world.target.set_namespace(1, namespace)
    assert link.run() == [host.NamespaceChanged(namespace)]


# --- time ---


def test_keep_alive_goes_twice_in_its_time_and_silence_ends_the_controller() -> None:
    controller, link = World().ready(settings(keep_alive_tmo=4.0))
    assert controller.get_timer() == 2.0
    link.now = 2.0
    assert controller.handle_timer(2.0) == []
    assert link.run() == []
    assert controller.get_timer() == 4.0
    link.now = 4.0
    controller.handle_timer(4.0)
    assert controller.get_timer() == 8.0
    (terminated,) = controller.handle_timer(8.0)
    assert isinstance(terminated, Terminated)
    assert isinstance(terminated.error, host.ControllerError)


def test_a_target_gives_a_silent_host_up() -> None:
    world = World()
    _, link = world.ready(settings(keep_alive_tmo=2.0))
    assert link.session.get_timer() == 4.0
    assert link.session.handle_timer(3.9) == []
    link.session.handle_timer(4.0)
    assert link.session.over
    assert world.target.controllers == {}
    assert not world.target.sessions


def test_a_connection_that_never_says_who_it_is_ends() -> None:
    world = World()
    session = world.target.accept(5.0)
    assert session.get_timer() == 15.0
    session.handle_timer(15.0)
    assert session.over
    assert world.target.sessions == set()


def test_a_target_that_does_not_answer() -> None:
    queue = QueuePair(Connect("s", "h", bytes(16)), with_digests(False, False), 1.0)
    assert queue.get_timer() == 11.0
    assert queue.handle_timer(10.9) == []
    (terminated,) = queue.handle_timer(11.0)
    assert isinstance(terminated, Terminated)
    queue, link = World().queue()
    link.answering = False
    cid = queue.submit(nvme.flush(1), 100.0)
    link.run()
    assert queue.get_timer() == 130.0
    (terminated,) = queue.handle_timer(130.0)
    assert isinstance(terminated, Terminated)
    assert terminated.unfinished == (cid,)


# --- buffers ---


def test_read_data_is_received_where_it_belongs() -> None:
    queue, link = World().queue()
    link.medium.data[:8192] = pattern(8192)
    link.answering = False
    page = bytearray(8192)
    queue.submit(nvme.read(1, 0, 2), 0.0, into=memoryview(page))
    link.run()
    link.answer()
    stream = b"".join(map(bytes, link.session.data_to_send()))
    queue.get_buffer()[:50] = stream[:50]
    queue.buffer_updated(50, 0.0)
    room = queue.get_buffer()
    assert room.obj is page
    assert len(room) == 8192 - (50 - 24)
    room[:] = stream[50 : 24 + 8192]
    assert queue.buffer_updated(len(room), 0.0) == []
    assert queue.get_buffer().obj is not page
    assert queue.receive_data(stream[24 + 8192 :], 0.0) == [Completed(1, 0, 0)]
    assert page == pattern(8192)


def test_an_abandoned_read_touches_its_buffer_no_more() -> None:
    queue, link = World().queue()
    link.medium.data[:4096] = pattern(4096)
    link.answering = False
    page = bytearray(4096)
    cid = queue.submit(nvme.read(1, 0, 1), 0.0, into=memoryview(page))
    link.run()
    link.answer()
    stream = b"".join(map(bytes, link.session.data_to_send()))
    queue.receive_data(stream[:1000], 0.0)
    queue.abandon(cid)
    assert queue.receive_data(stream[1000:], 0.0) == [Completed(cid, 0, 0)]
    assert page == pattern(4096)[: 1000 - 24].ljust(4096, b"\0")


@pytest.mark.parametrize("size", [4096, 16384])
def test_an_abandoned_write_is_sent_from_a_copy(size: int) -> None:
    queue, link = World().queue()
    data = bytearray(pattern(size))
    cid = queue.submit(nvme.write(1, 0, size // 4096), 0.0, data=data)
    queue.abandon(cid)
    data[:] = bytes(size)
    assert link.run() == [Completed(cid, 0, 0)]
    assert link.medium.data[:size] == pattern(size)


def test_payloads_are_sent_uncopied() -> None:
    queue, _ = World().queue()
    page = bytearray(4096)
    queue.submit(nvme.write(1, 0, 1), 0.0, data=page)
    assert [getattr(part, "obj", None) is page for part in queue.data_to_send()] == [False, True]


# --- limits and mistakes of this end ---


@pytest.mark.parametrize(("flow_control", "capacity"), [(True, 7), (False, 8)])
def test_a_queue_holds_what_it_has_entries_for(flow_control: bool, capacity: int) -> None:
    queue, link = World().queue(settings(entries=8, flow_control=flow_control))
    assert queue.room == capacity
    for _ in range(capacity):
        queue.submit(nvme.flush(1), 0.0)
    with pytest.raises(LocalProtocolError, match="outstanding"):
        queue.submit(nvme.flush(1), 0.0)
    assert len(link.run()) == capacity
    assert queue.room == capacity


def test_mistakes_of_the_user_change_nothing() -> None:
    queue, link = World().queue()
    page = bytearray(4096)
    with pytest.raises(LocalProtocolError, match="both"):
        queue.submit(nvme.read(1, 0, 1), 0.0, data=b"x", into=memoryview(page))
    with pytest.raises(LocalProtocolError, match="written to"):
        queue.submit(nvme.read(1, 0, 1), 0.0, into=memoryview(bytes(4096)))
    with pytest.raises(LocalProtocolError, match="pieces"):
        queue.submit(nvme.read(1, 0, 1), 0.0, into=memoryview(page)[::2])
    with pytest.raises(LocalProtocolError, match="outstanding"):
        queue.abandon(99)
    with pytest.raises(LocalProtocolError, match="bytes in a buffer"):
        queue.buffer_updated(1 << 20, 0.0)
    assert queue.data_to_send() == []
    queue.submit(nvme.flush(1), 0.0)
    assert len(link.run()) == 1
    queue.close()
    with pytest.raises(LocalProtocolError, match="CLOSED"):
        queue.submit(nvme.flush(1), 0.0)


def test_answers_that_the_target_was_not_asked_for() -> None:
    queue, link = World().queue()
    link.answering = False
    queue.submit(nvme.read(1, 0, 1), 0.0, into=memoryview(bytearray(4096)))
    link.run()
    (operation,) = link.operations
    with pytest.raises(LocalProtocolError, match="bytes of data"):
        link.session.queue.complete(operation.cid, 0, 0, b"short")
    with pytest.raises(LocalProtocolError):
        link.session.complete(Operation(99, operation.kind, 1))


# --- refusals ---


def refused(world: World, wanted: host.Settings) -> ConnectRefusedError:
    _, link = world.controller(wanted)
    (terminated,) = link.run()
    assert isinstance(terminated, Terminated)
    assert isinstance(terminated.error, ConnectRefusedError)
    return terminated.error


def test_who_may_not_connect_is_told_why() -> None:
    error = refused(World(), settings(subsystem="nqn.other"))
    assert (nvme.code_of(error.status), error.result) == (Status.CONNECT_INVALID, 0x10100)
    world = World(rules=Rules(hosts=frozenset({"nqn.somebody"})))
    error = refused(world, settings())
    assert (nvme.code_of(error.status), error.result) == (Status.CONNECT_INVALID_HOST, 0x10200)
    world = World(rules=Rules(controllers_per_host=1))
    world.ready()
    assert nvme.code_of(refused(world, settings()).status) == Status.CONNECT_BUSY


def test_connections_are_bounded() -> None:
    world = World(rules=Rules(connections=2))
    world.ready()
    _, link = world.ready()
    with pytest.raises(RefusedError):
        world.target.accept(0.0)
    link.session.eof_received(0.0)
    world.ready()


def test_silent_connections_keep_nobody_out() -> None:
    world = World(rules=Rules(unconnected=3))
    queue, link = world.queue()
    first = world.target.accept(0.0)
    for number in range(1000):
        world.target.accept(0.0).receive_data(bytes([0, 0, 128, 0])[: number % 5], 0.0)
    assert first.over
    assert first in world.target.touched
    assert len(world.target.sessions) == 5
    world.ready()
    queue.submit(nvme.flush(1), 0.0)
    assert link.run() == [Completed(1, 0, 0)]


def test_a_namespace_that_is_not_there() -> None:
    _, link = World().controller(settings(nsid=5))
    (terminated,) = link.run()
    assert isinstance(terminated, Terminated)
    assert "no namespace 5" in str(terminated.error)


def test_all_connections_of_a_controller_end_together() -> None:
    world = World()
    controller, admin = world.ready()
    queue = controller.io_queue(1, 0.0)
    link = world.link(queue)
    link.run()
    other, _ = world.ready()
    link.session.receive_data(bytes(128), 0.0)  # a second ICReq
    assert admin.session.over
    assert admin.session in world.target.touched
    assert [session.over for session in world.target.sessions] == [False]
    assert other.queue.error is None


def test_a_host_may_close_its_queues_before_it_leaves_the_controller() -> None:
    world = World()
    controller, admin = world.ready()
    link = world.link(controller.io_queue(1, 0.0))
    link.run()
    assert len(world.target.sessions) == 2
    assert link.session.eof_received(0.0)
    assert world.target.sessions == {admin.session}
    link = world.link(controller.io_queue(1, 0.0))
    assert len(link.run()) == 1  # the queue can be connected again
    link.session.eof_received(0.0)
    controller.shutdown(0.0)
    assert [type(event).__name__ for event in admin.run()] == ["ShutDown"]
    admin.session.eof_received(0.0)
    assert (world.target.sessions, world.target.controllers) == (set(), {})


def test_identify_tells_which_controller_it_is() -> None:
    world = World()
    numbers = [world.ready()[0].ready for _ in range(3)]
    assert [ready and ready.controller.controller for ready in numbers] == [1, 2, 3]


def test_errors_of_the_medium_reach_the_host() -> None:
    queue, link = World().queue()
    link.answering = False
    page = bytearray(b"x" * 4096)
    queue.submit(nvme.read(1, 0, 1), 0.0, into=memoryview(page))
    link.run()
    link.answer(MEDIUM_ERROR)
    assert link.run() == [Completed(1, MEDIUM_ERROR | DO_NOT_RETRY, 0)]
    assert page == b"x" * 4096


def test_reads_and_writes_beyond_the_end() -> None:
    queue, link = World().queue()
    queue.submit(nvme.read(1, 1024, 1), 0.0, into=memoryview(bytearray(4096)))
    queue.submit(nvme.write(1, 1 << 40, 1), 0.0, data=bytes(4096))
    out_of_range = Status.LBA_OUT_OF_RANGE | DO_NOT_RETRY
    assert link.run() == [Completed(1, out_of_range, 0), Completed(2, out_of_range, 0)]


def test_a_write_waits_for_the_budget() -> None:
    world = World(rules=Rules(limits=Limits(asked=40 * 1024)))
    queue, link = world.queue()
    link.answering = False
    for at in range(4):
        queue.submit(nvme.write(1, at * 4, 4), 0.0, data=pattern(16384, at))
    link.run()
    assert len(link.operations) == 2
    link.answering = True
    assert len(link.run()) == 4
    assert bytes(link.medium.data[:65536]) == b"".join(pattern(16384, at) for at in range(4))
