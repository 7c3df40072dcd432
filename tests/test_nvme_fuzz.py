"""A short run of the fuzzer: `make fuzz` is the long one."""

from nvme_fuzz import fuzz

INPUTS = 4000


def test_both_ends_take_whatever_comes(seed: int) -> None:
    found = fuzz(INPUTS, seed)
    # Each end was led to every kind of outcome, else the mutations miss something.
    assert {f"{end} {told}" for end in ("host", "target") for told in ("events", "ended")} <= {
        *found
    }
