"""Control messages: what is whole comes through, what is not harms nobody, none is lost."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from userswap.engine.control import (
    DESCRIPTORS_MAX,
    MESSAGE_MAX,
    Caller,
    Message,
    receive,
    send,
)
from userswap.engine.errors import ConfigError, PagerError, ResidentError, UserswapError

Pair = tuple[socket.socket, socket.socket]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.settimeout(10)
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def caller(pair: Pair) -> Iterator[Caller]:
    pair[0].settimeout(None)
    made = Caller(pair[0])
    yield made
    made.close()


def answer(pager: socket.socket, **values: object) -> Message:
    """Answer one request well; what it was."""
    request, _ = receive(pager)
    assert request is not None
    send(pager, {"id": request["id"], "ok": True, **values})
    return request


def in_background(function: object, *arguments: object) -> threading.Thread:
    assert callable(function)
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def test_messages_and_descriptors_come_through(pair: Pair) -> None:
    before = open_descriptors()
    reading, writing = os.pipe()
    send(
        pair[0],
        {"text": "gr\u00fc\u00df \x00 \U0001f600", "many": [1, 2.5, None]},
        [reading] * DESCRIPTORS_MAX,
    )
    message, received = receive(pair[1])
    assert message == {"text": "gr\u00fc\u00df \x00 \U0001f600", "many": [1, 2.5, None]}
    assert len(received) == DESCRIPTORS_MAX
    assert not any(os.get_inheritable(descriptor) for descriptor in received)
    os.write(writing, b"x")
    assert os.read(received[3], 1) == b"x"
    for descriptor in (reading, writing, *received):
        os.close(descriptor)
    assert open_descriptors() == before


def test_the_end_is_told(pair: Pair) -> None:
    send(pair[0], {"last": 1})
    pair[0].close()
    assert receive(pair[1]) == ({"last": 1}, [])
    assert receive(pair[1]) == (None, [])


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"[]",
        b"null",
        b"7",
        b"\xff\xfe",
        b"\x00" * 100,
        b'{"a": 1} {"b": 2}',
        b"[" * 60_000,
        b'{"a": ' * 9_000,
        b'"' + b"x" * (MESSAGE_MAX + 10) + b'"',
    ],
)
def test_garbage_is_an_error_and_leaves_no_descriptor(pair: Pair, payload: bytes) -> None:
    before = open_descriptors()
    reading, writing = os.pipe()
    socket.send_fds(pair[0], [payload], [reading, writing])
    with pytest.raises(PagerError, match="cannot be understood"):
        receive(pair[1])
    os.close(reading)
    os.close(writing)
    assert open_descriptors() == before
    send(pair[0], {"next": True})
    assert receive(pair[1]) == ({"next": True}, [])


def test_what_is_too_large_is_not_sent(pair: Pair) -> None:
    send(pair[0], {"x": "y" * (MESSAGE_MAX - 8)})
    assert receive(pair[1])[0] == {"x": "y" * (MESSAGE_MAX - 8)}
    with pytest.raises(PagerError, match=f"over {MESSAGE_MAX}"):
        send(pair[0], {"x": "y" * (MESSAGE_MAX - 7)})


def test_more_descriptors_than_fit(pair: Pair) -> None:
    before = open_descriptors()
    reading, writing = os.pipe()
    socket.send_fds(pair[0], [b"{}"], [reading] * (DESCRIPTORS_MAX + 1))
    with pytest.raises(PagerError, match="descriptors that came with it were lost"):
        receive(pair[1])
    os.close(reading)
    os.close(writing)
    assert open_descriptors() == before


def test_descriptors_that_find_no_room(pair: Pair) -> None:
    before = open_descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    reading, writing = os.pipe()
    socket.send_fds(pair[0], [b"{}"], [reading, writing, reading])
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    free = next(number for number in range(len(taken) + 1) if number not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(PagerError, match="ulimit -n"):
            receive(pair[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    os.close(reading)
    os.close(writing)
    assert open_descriptors() == before


def test_calls(pair: Pair, caller: Caller) -> None:
    thread = in_background(answer, pair[1])
    assert caller.call("look", at=5)["ok"] is True
    thread.join()

    def serve(kind: str) -> None:
        request, _ = receive(pair[1])
        assert request is not None
        send(pair[1], {"id": request["id"], "ok": False, "kind": kind, "error": "so it is"})

    for kind, error in (
        ("config", ConfigError),
        ("resident", ResidentError),
        ("pager", PagerError),
        ("unheard of", UserswapError),
    ):
        in_background(serve, kind)
        with pytest.raises(error, match="so it is"):
            caller.call("look")
    assert not caller.ended


def test_answers_find_their_callers_in_any_order(pair: Pair, caller: Caller) -> None:
    callers = 16

    def serve() -> None:
        requests = [receive(pair[1])[0] for _ in range(callers)]
        for request in sorted(requests, key=lambda request: -request["who"] if request else 0):
            assert request is not None
            send(pair[1], {"id": request["id"], "ok": True, "you": request["who"]})

    got: dict[int, int] = {}

    def ask(who: int) -> None:
        got[who] = caller.call("who", who=who)["you"]

    server = in_background(serve)
    for thread in [in_background(ask, who) for who in range(callers)]:
        thread.join(10)
    server.join(10)
    assert got == {who: who for who in range(callers)}


def test_answers_that_nobody_waits_for_leave_no_descriptor(pair: Pair, caller: Caller) -> None:
    before = open_descriptors()
    reading, writing = os.pipe()
    for number in (77, -1, "1", None, [1], {"a": 1}, 1.5, True):
        send(pair[1], {"id": number, "ok": True}, [reading, writing])
    thread = in_background(answer, pair[1])
    assert caller.call("look")["descriptors"] == []
    thread.join()
    os.close(reading)
    os.close(writing)
    assert open_descriptors() == before


@pytest.mark.parametrize("last", [b"", b"rubbish", json.dumps({"id": 99}).encode()])
def test_the_pagers_end_ends_every_wait(pair: Pair, caller: Caller, last: bytes) -> None:
    errors: list[str] = []

    def ask() -> None:
        try:
            caller.call("wait")
        except PagerError as error:
            errors.append(str(error))

    threads = [in_background(ask) for _ in range(5)]
    for _ in threads:
        receive(pair[1])
    if last:
        pair[1].send(last)
    pair[1].close()
    for thread in threads:
        thread.join(10)
    reason = "understood" if last == b"rubbish" else "gone"
    assert [reason in error for error in errors] == [True] * 5, errors
    with pytest.raises(PagerError, match=reason):
        caller.call("again")
    assert caller.ended


def test_a_wait_has_an_end_where_one_is_given(caller: Caller) -> None:
    start = time.monotonic()
    with pytest.raises(PagerError, match="not answered for"):
        caller.call("wait", timeout=0.05)
    assert time.monotonic() - start < 5
    assert not caller.ended


@pytest.mark.parametrize("late", [True, False])
def test_an_answer_that_comes_too_late_leaves_no_descriptor(
    pair: Pair, caller: Caller, late: bool
) -> None:
    before = open_descriptors()
    reading, writing = os.pipe()
    pending = caller.begin("wait")
    if late:
        with pytest.raises(PagerError, match="not answered for"):
            pending.wait(timeout=0.01)
    request, _ = receive(pair[1])
    assert request is not None
    send(pair[1], {"id": request["id"], "ok": late}, [reading, writing])
    if not late:
        with pytest.raises(UserswapError):
            pending.wait()
    thread = in_background(answer, pair[1])
    caller.call("look")  # whose answer comes after
    thread.join()
    os.close(reading)
    os.close(writing)
    assert open_descriptors() == before


def test_close_ends_the_receiving_thread(pair: Pair) -> None:
    before = threading.active_count()
    pair[0].settimeout(None)
    made = Caller(pair[0])
    assert threading.active_count() == before + 1
    made.close()
    assert threading.active_count() == before
    assert receive(pair[1]) == (None, [])
    with pytest.raises(PagerError):
        made.call("look")
