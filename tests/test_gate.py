"""The entrance of a store: bounded, the urgent first, and nobody forgotten."""

import asyncio
import contextlib
import random

from userswap.engine.gate import Gate, Urgency


async def test_demand_overtakes_what_waits() -> None:
    gate = Gate(4)
    order: list[str] = []

    async def work(name: str, urgency: Urgency) -> None:
        await gate.enter(urgency)
        order.append(name)
        await asyncio.sleep(0)
        gate.leave()

    for _ in range(4):
        await gate.enter(Urgency.DEMAND)
    tasks = [
        asyncio.create_task(work(name, urgency))
        for name, urgency in (
            ("write", Urgency.WRITE_BACK),
            ("ahead", Urgency.READAHEAD),
            ("fault", Urgency.DEMAND),
        )
    ]
    await asyncio.sleep(0)
    assert order == []
    for _ in range(4):
        gate.leave()
    await asyncio.gather(*tasks)
    assert order == ["fault", "ahead", "write"]


async def test_writes_leave_room_for_demand() -> None:
    gate = Gate(4)
    for _ in range(3):
        await gate.enter(Urgency.WRITE_BACK)
    fourth = asyncio.create_task(gate.enter(Urgency.WRITE_BACK))
    await asyncio.sleep(0)
    assert not fourth.done()
    await asyncio.wait_for(gate.enter(Urgency.DEMAND), 20)
    gate.leave()
    assert not fourth.done()
    gate.leave()
    await asyncio.wait_for(fourth, 20)


async def test_never_too_many_and_nobody_forgotten(seed: int) -> None:
    rng = random.Random(seed)
    gate = Gate(8)
    inside = 0
    ended = 0

    async def work() -> None:
        nonlocal inside, ended
        await gate.enter(rng.choice(list(Urgency)))
        try:
            inside += 1
            assert inside <= 8
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        finally:
            inside -= 1
            ended += 1
            gate.leave()

    tasks = [asyncio.create_task(work()) for _ in range(500)]
    given_up = 0
    for _ in range(100):
        await asyncio.sleep(0)
        given_up += rng.choice(tasks).cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 20)
    assert given_up
    for _ in range(8):  # every place is free again
        await asyncio.wait_for(gate.enter(Urgency.DEMAND), 20)
