"""Region(store=object): the user's own store, in the embedded pager."""

import pytest

import own_scenarios
from proof import call, check


@pytest.mark.parametrize("made", [False, True])
def test_pages_go_to_an_object(made: bool) -> None:
    check(call(own_scenarios.page_to_an_object, made=made))


def test_what_is_no_store_is_refused() -> None:
    print(check(call(own_scenarios.offer_what_is_no_store)))
