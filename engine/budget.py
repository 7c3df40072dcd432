"""One budget for the regions of many clients: who may keep how much in memory.

Memory is shared as water fills vessels: every client has its minimum, then all rise together, each
as fast as its weight says, until it has what it can use; what nobody can use is spread as room to
grow. What a region can use is its *appetite*: all that it may have while it presses against its
limit, what it holds and a little more while it does not. A region that is quiet for long gives way
to others that press, slowly, down to its client's minimum, and has its share back once it presses.

Invariants:
 1. The limits never come to more than the total, between any two steps that `settle` returns.
 2. The minimums never come to more than the total; what a client uses of its minimum is not taken.
 3. A limit is raised only by what is free: memory above a limit that was lowered counts as taken
    while it comes back, for a while (GRACE): then whoever does not give it back no longer holds up
    the others.

Pure: time is what `settle` counts, and what regions use is told.

Must not know: clocks, asyncio, processes, pages.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from userswap.backends.grammar import format_size

PAGE = 4096
FLOOR = 4 << 20
"""No region has less, or it could not hold the pages that its threads need at once."""
WEIGHT_MIN, WEIGHT_MAX = 0.01, 100.0
HEADROOM = 1 << 20
STEP = 16 << 20
"""A limit comes down by so much at a time, or a quarter if that is more: faults find room."""
GRACE = 20
HOLD, HOLD_MAX = 20, 600
"""A region is quiet after so many looks; longer if it was wrong to think so before."""
FADE = 32
"""A quiet region gives way by this part of what it holds at each look."""
STILL = 64
"""Changes by less than this part of a limit are not worth their evictions."""


class BudgetError(Exception):
    """What is asked for would break what others were promised; the text has the figures."""


class Claim(NamedTuple):
    """What somebody shall have at least and can use at most."""

    low: int
    high: int
    weight: float


def fill(total: int, claims: Sequence[Claim]) -> list[int]:
    """Share `total` among claims whose lows it covers: whole pages, together never more."""
    if sum(claim.high for claim in claims) <= total:
        return [claim.high for claim in claims]
    level = _level(total, claims)
    shares = (min(max(level * claim.weight, claim.low), claim.high) for claim in claims)
    return [int(share) // PAGE * PAGE for share in shares]


def _level(total: int, claims: Iterable[Claim]) -> float:
    """The height of the water, per weight, at which the claims hold `total`."""
    held, slope, height = 0.0, 0.0, 0.0
    events: list[tuple[float, float]] = []
    for low, high, weight in claims:
        held += low
        events += [(low / weight, weight), (high / weight, -weight)]
    for at, change in sorted(events):
        if held + slope * (at - height) >= total:
            break
        held += slope * (at - height)
        slope, height = slope + change, at
    return height + (total - held) / slope if slope > 1e-9 else height


@dataclass(slots=True)
class Account:
    """A region in the budget."""

    floor: int
    cap: int
    """What it asked for: its upper limit."""
    weight: float = 1.0
    limit: int = 0
    used: int = 0
    pressed: bool = False
    appetite: int = 0
    owed: int = 0
    """The limit from which it is coming down."""
    grace: int = 0
    calm: int = 0
    hold: int = HOLD
    faded: bool = False

    def taken(self) -> int:
        """What is not free because of it."""
        return max(self.limit, min(self.used, self.owed))

    def feel(self, hungry: bool, kept: int) -> None:
        """One look at what it can use. `hungry`: others press; `kept`: below it nothing fades."""
        if self.pressed:
            if self.faded:
                self.hold = min(self.hold * 2, HOLD_MAX)
            self.calm, self.faded, self.appetite = 0, False, self.cap
            return
        self.calm += 1
        room = self.used + max(HEADROOM, self.used // 8)
        if self.calm <= self.hold or not hungry:
            wanted = min(room, self.appetite) if self.faded else room
        else:
            wanted = min(room, self.appetite) - self.used // FADE
            self.faded = True
        self.appetite = min(max(wanted // PAGE * PAGE, self.floor, min(kept, room)), self.cap)
        if self.faded and self.appetite == self.floor:
            self.hold = HOLD  # it was right to think so

    def settle_debt(self) -> None:
        """One look at whether memory above the limit came back."""
        self.grace = max(self.grace - 1, 0)
        if not self.grace or self.used <= self.limit:
            self.owed = self.limit


@dataclass(slots=True)
class Holder:
    """A client in the budget."""

    minimum: int
    weight: float = 1.0
    accounts: dict[Hashable, Account] = field(default_factory=dict)

    @property
    def reserved(self) -> int:
        """What it is promised."""
        floors = sum(account.floor for account in self.accounts.values())
        caps = sum(account.cap for account in self.accounts.values())
        return max(floors, min(self.minimum, caps))

    def claim(self) -> Claim:
        appetite = sum(account.appetite for account in self.accounts.values())
        floors = sum(account.floor for account in self.accounts.values())
        return Claim(max(floors, min(self.reserved, appetite)), appetite, self.weight)

    def room(self) -> int:
        return sum(account.cap for account in self.accounts.values())


class Budget:
    """`total` bytes for all; `minimum` is what a client is promised unless it is told otherwise."""

    def __init__(self, total: int, minimum: int) -> None:
        self.total = total // PAGE * PAGE
        self.minimum = minimum // PAGE * PAGE
        self.holders: dict[Hashable, Holder] = {}

    def open(self, client: Hashable, region: Hashable, cap: int) -> int:
        """A new region; its limit, once `settle` has been applied. Raises BudgetError."""
        cap = max(cap // PAGE, 1) * PAGE
        account = Account(min(FLOOR, cap), cap)
        holder = self.standing(client)
        holder.accounts[region] = account
        try:
            self._check(f"a region with resident={format_size(cap)}", holder)
        except BudgetError:
            del holder.accounts[region]
            raise
        # It begins with what it is promised, and has more by the next look.
        account.appetite = min(cap, max(account.floor, holder.minimum))
        return account.floor

    def standing(self, client: Hashable) -> Holder:
        """A client's minimum and weight, which stay when its last region goes."""
        if client not in self.holders:
            self.holders[client] = Holder(self.minimum)
        return self.holders[client]

    def leave(self, client: Hashable) -> None:
        """The client is gone."""
        self.holders.pop(client, None)

    def close(self, client: Hashable, region: Hashable) -> None:
        self.holders[client].accounts.pop(region, None)

    def account(self, client: Hashable, region: Hashable) -> Account:
        return self.holders[client].accounts[region]

    def resize(self, client: Hashable, region: Hashable, cap: int) -> None:
        """Another upper limit for a region. Raises BudgetError."""
        holder, account = self.holders[client], self.account(client, region)
        before = account.cap, account.floor
        account.cap = max(cap // PAGE, 1) * PAGE
        account.floor = min(FLOOR, account.cap)
        try:
            self._check(f"resident={format_size(account.cap)}", holder)
        except BudgetError:
            account.cap, account.floor = before
            raise
        account.appetite = min(max(account.appetite, account.floor), account.cap)

    def promise(self, client: Hashable, region: Hashable | None, minimum: int) -> None:
        """Another minimum for a client, or for one region. Raises BudgetError."""
        holder = self.standing(client)
        account = holder.accounts[region] if region is not None else None
        before = holder.minimum, account.floor if account else 0
        minimum = minimum // PAGE * PAGE
        if minimum > self.total:
            raise BudgetError(
                f"min={format_size(minimum)} is more than all of {format_size(self.total)}"
            )
        if account:
            account.floor = min(max(minimum, FLOOR), account.cap)
        else:
            holder.minimum = minimum
        try:
            self._check(f"min={format_size(minimum)}", holder)
        except BudgetError:
            holder.minimum = before[0]
            if account:
                account.floor = before[1]
            raise
        if account:
            account.appetite = max(account.appetite, account.floor)

    def weigh(self, client: Hashable, region: Hashable | None, weight: float) -> None:
        """Another weight for a client among clients, or for a region among its client's."""
        if not WEIGHT_MIN <= weight <= WEIGHT_MAX:
            raise BudgetError(f"weight={weight:g}: use {WEIGHT_MIN:g} to {WEIGHT_MAX:g}")
        holder = self.standing(client)
        if region is None:
            holder.weight = weight
        else:
            holder.accounts[region].weight = weight

    def _check(self, what: str, holder: Holder) -> None:
        others = sum(each.reserved for each in self.holders.values() if each is not holder)
        if others + holder.reserved > self.total:
            raise BudgetError(
                f"{what} needs a minimum of {format_size(holder.reserved)} for its client: of "
                f"{format_size(self.total)}, {format_size(others)} are promised to others"
            )

    def observe(self, client: Hashable, region: Hashable, used: int, pressed: bool) -> None:
        """What a region holds, and whether it presses against its limit."""
        account = self.account(client, region)
        account.used, account.pressed = used, pressed

    def accounts(self) -> Iterator[tuple[Hashable, Hashable, Account]]:
        for client, holder in self.holders.items():
            for region, account in holder.accounts.items():
                yield client, region, account

    def settle(self) -> list[tuple[Hashable, Hashable, int]]:
        """One look: the limits that change, in the order in which to apply them."""
        every = list(self.accounts())
        hungry = any(account.pressed and account.limit < account.cap for _, _, account in every)
        for holder in self.holders.values():
            used = sum(account.used for account in holder.accounts.values()) or 1
            for account in holder.accounts.values():
                account.feel(hungry, holder.reserved * account.used // used)
        targets = self._targets()
        for _, _, account in every:
            account.settle_debt()
        lowered = self._lower(every, targets)
        return lowered + self._raise(every, targets)

    def _targets(self) -> list[int]:
        """What each region shall have, in the order of `accounts`."""
        holders = list(self.holders.values())
        shares = _fill_twice(self.total, [(holder.claim(), holder.room()) for holder in holders])
        targets: list[int] = []
        for holder, share in zip(holders, shares, strict=True):
            accounts = holder.accounts.values()
            claims = [(Claim(a.floor, a.appetite, a.weight), a.cap) for a in accounts]
            targets += _fill_twice(share, claims)
        return targets

    def _lower(
        self, every: list[tuple[Hashable, Hashable, Account]], targets: list[int]
    ) -> list[tuple[Hashable, Hashable, int]]:
        limits = sum(account.limit for _, _, account in every)
        lacking = sum(max(account.floor - account.limit, 0) for _, _, account in every)
        urgent = limits + lacking > self.total  # a new region has not even its floor
        lowered = []
        for (client, region, account), target in zip(every, targets, strict=True):
            down = account.limit - target
            if down <= 0 or (down < account.limit // STILL and not urgent and target < account.cap):
                continue
            step = down if urgent else min(down, max(STEP, account.limit // 4 // PAGE * PAGE))
            step = max(step, account.limit - account.cap)  # a cap that was lowered holds at once
            account.owed = max(account.owed, account.limit)
            account.grace = GRACE
            account.limit -= step
            lowered.append((client, region, account.limit))
        return lowered

    def _raise(
        self, every: list[tuple[Hashable, Hashable, Account]], targets: list[int]
    ) -> list[tuple[Hashable, Hashable, int]]:
        raised: dict[int, tuple[Hashable, Hashable, int]] = {}
        for number, (client, region, account) in enumerate(every):
            if account.limit < account.floor:  # whoever owes, a new region must be able to run
                account.limit = account.floor
                raised[number] = (client, region, account.limit)
        room = self.total - sum(account.taken() for _, _, account in every)
        claims = []
        for (_, _, account), target in zip(every, targets, strict=True):
            up = max(target - account.limit, 0)
            still = up < account.limit // STILL and target < account.cap
            claims.append(Claim(0, 0 if still else up, account.weight))
        for number, share in enumerate(fill(max(room, 0), claims)):
            if share:
                client, region, account = every[number]
                account.limit += share
                raised[number] = (client, region, account.limit)
        return list(raised.values())


def _fill_twice(total: int, claims: Sequence[tuple[Claim, int]]) -> list[int]:
    """First what can be used, then room to grow up to each claim's cap."""
    first = fill(total, [claim for claim, _ in claims])
    rest = [
        Claim(share, max(cap, share), claim.weight)
        for share, (claim, cap) in zip(first, claims, strict=True)
    ]
    return fill(total, rest)
