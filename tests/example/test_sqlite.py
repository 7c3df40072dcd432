import pytest

from userswap.backends.conformance import CHECKS, against

test_sqlite = pytest.mark.parametrize("check", CHECKS)(against("sqlite:{dir}/db"))
