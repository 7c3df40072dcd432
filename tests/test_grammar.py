"""How values are written: what reads, what does not, and what the errors say."""

import pickle
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userswap.backends.grammar import (
    SIZE_MAX,
    GrammarError,
    LayerSpec,
    Options,
    StackSpec,
    format_size,
    parse_boolean,
    parse_duration,
    parse_size,
    parse_store_url,
    without_password,
)

MIB = 1024**2
STORES = ("ram", "memory", "lmdb", "file", "nvme+tcp")
FILTERS = ("checksum", "tier", "retry")


def refusal(call: Callable[[], object]) -> GrammarError:
    with pytest.raises(GrammarError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 536870912),
        ("512MiB", 536870912),
        ("512m", 536870912),
        ("512 MiB", 536870912),
        (" 512MiB ", 536870912),
        ("1.5GiB", 1536 * MIB),
        ("0.5K", 512),
        ("1.0001K", 1024),
        ("4096", 4096),
        ("4096B", 4096),
        ("0", 0),
        ("1TiB", 1024**4),
        ("2P", 2 * 1024**5),
        ("7E", 7 * 1024**6),
        (4096, 4096),
    ],
)
def test_sizes_that_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "position", "said"),
    [
        ("512MB", 3, "write 512MiB, which is 512 x 1024^2"),
        ("2gb", 1, "write 2GiB"),
        ("1.5kB", 3, "write 1.5KiB"),
        ("-1", 0, "negative"),
        ("-1GiB", 0, "negative"),
        ("nan", 0, "512MiB"),
        ("inf", 0, "512MiB"),
        ("1e9", 1, "512MiB"),
        ("0x1000", 1, "512MiB"),
        ("1_000", 1, "512MiB"),
        ("1,5GiB", 1, "decimal sign"),
        ("1.5", 0, "lacks a unit"),
        (".5G", 0, "512MiB"),
        ("M", 0, "512MiB"),
        ("5X", 1, "the units are K, M"),
        ("5MiBs", 1, "the units are K, M"),
        ("8E", 0, "too large"),
        ("9" * 40, 0, "too large"),
        ("50%", 0, "no whole"),
        ("٣M", 0, "512MiB"),
    ],
)
def test_sizes_that_do_not_read(text: str, position: int, said: str) -> None:
    error = refusal(lambda: parse_size(text))
    assert said in str(error)
    assert error.position == position


def test_an_empty_or_negative_size_is_refused() -> None:
    assert "empty" in str(refusal(lambda: parse_size("")))
    assert "empty" in str(refusal(lambda: parse_size("  ")))
    assert "negative" in str(refusal(lambda: parse_size(-1)))
    assert "too large" in str(refusal(lambda: parse_size(SIZE_MAX + 1)))
    assert parse_size(SIZE_MAX) == SIZE_MAX


def test_a_share_needs_a_whole() -> None:
    assert parse_size("50%", whole=1001) == 500
    assert parse_size("12.5%", whole=MIB) == MIB // 8
    assert parse_size("100%", whole=MIB) == MIB
    assert parse_size("3K", whole=MIB) == 3072
    assert "more than the whole" in str(refusal(lambda: parse_size("101%", whole=MIB)))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1000, "1000B"),
        (1024, "1KiB"),
        (1536 * MIB, "1.5GiB"),
        (512 * MIB, "512MiB"),
        (MIB - 1, "1MiB"),
        (100 * MIB + 1, "100MiB"),
        (SIZE_MAX, "8EiB"),
        (-2048, "-2KiB"),
    ],
)
def test_sizes_as_they_are_shown(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1023), st.integers(0, 5))
def test_a_whole_size_reads_back_exactly(amount: int, power: int) -> None:
    size = amount * 1024**power
    assert parse_size(format_size(size)) == size


@given(st.integers(0, SIZE_MAX // 2))
def test_any_size_reads_back_within_a_hundredth_of_its_unit(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size * 0.01


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5s", 5),
        ("1ms", 0.001),
        ("500us", 0.0005),
        ("20ns", 2e-8),
        ("2min", 120),
        ("1.5h", 5400),
        ("0s", 0),
    ],
)
def test_durations_that_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", "lacks a unit"),
        ("0", "lacks a unit"),
        ("5m", "minutes or milliseconds"),
        ("5S", "units are"),
        ("-5s", "negative"),
        ("1e3s", "5s or 10ms"),
        ("nan", "5s or 10ms"),
        ("1000000h", "too long"),
        ("", "empty"),
    ],
)
def test_durations_that_do_not_read(text: str, said: str) -> None:
    assert said in str(refusal(lambda: parse_duration(text)))


def test_booleans_are_on_or_off() -> None:
    assert parse_boolean("on") is True
    assert parse_boolean("off") is False
    assert "write on" in str(refusal(lambda: parse_boolean("True")))
    assert "write off" in str(refusal(lambda: parse_boolean("0")))
    assert "on or off" in str(refusal(lambda: parse_boolean("")))


@pytest.mark.parametrize(
    ("url", "filters", "store"),
    [
        ("ram:lz4", [], ("ram", "lz4", {})),
        ("memory:", [], ("memory", "", {})),
        ("ram:zstd?level=1&limit=2GiB", [], ("ram", "zstd", {"level": "1", "limit": "2GiB"})),
        (
            "checksum::lmdb:/var/lib/swap?codec=zstd",
            [("checksum", {})],
            ("lmdb", "/var/lib/swap", {"codec": "zstd"}),
        ),
        (
            "tier?fast=ram:lz4&limit=256MiB::file:/dev/vdb",
            [("tier", {"fast": "ram:lz4", "limit": "256MiB"})],
            ("file", "/dev/vdb", {}),
        ),
        (
            "retry?times=3::checksum::file:/a",
            [("retry", {"times": "3"}), ("checksum", {})],
            ("file", "/a", {}),
        ),
        (
            "nvme+tcp://host:4420/NQN?nsid=1&data_digest=on",
            [],
            ("nvme+tcp", "//host:4420/NQN", {"nsid": "1", "data_digest": "on"}),
        ),
        ("nvme+tcp://[fe80::1]:4420/nqn:a", [], ("nvme+tcp", "//[fe80::1]:4420/nqn:a", {})),
        ("file:/a%3Fb%25%26?x=%26%3f", [], ("file", "/a?b%&", {"x": "&?"})),
        ("file:/a?x=", [], ("file", "/a", {"x": ""})),
        ("file:/a?x=1=2", [], ("file", "/a", {"x": "1=2"})),
        ("file:/a+b c", [], ("file", "/a+b c", {})),
    ],
)
def test_stacks_that_read(
    url: str,
    filters: list[tuple[str, dict[str, str]]],
    store: tuple[str, str, dict[str, str]],
) -> None:
    stack = parse_store_url(url, stores=STORES, filters=FILTERS)
    assert [(layer.name, layer.options) for layer in stack.filters] == filters
    assert (stack.store.name, stack.store.target, stack.store.options) == store
    for layer in (*stack.filters, stack.store):
        assert url.startswith(layer.name, layer.position)
        for name, place in layer.option_positions.items():
            assert url.startswith(f"{name}=", place - len(name) - 1)


@pytest.mark.parametrize(
    ("url", "position", "said"),
    [
        ("rma:lz4", 0, "unknown store 'rma'; did you mean 'ram'?"),
        ("zzz:lz4", 0, "there are: file, lmdb, memory, nvme+tcp, ram"),
        ("cheksum::ram:lz4", 0, "unknown filter 'cheksum'; did you mean 'checksum'?"),
        ("checksum::rm:lz4", 10, "unknown store 'rm'; did you mean 'ram'?"),
        ("ram::lz4:", 3, "'ram' is a store, not a filter: one colon"),
        ("checksum:ram:lz4", 8, "'checksum' is a filter, not a store: two colons"),
        ("ram", 3, "a store is written 'ram:'"),
        ("ram?limit=2GiB", 3, "a store is written 'ram:?...', a filter 'ram?...::'"),
        ("checksum::", 10, "no store follows the filter 'checksum'"),
        ("Ram:lz4", 0, "lower case"),
        ("(ram:lz4)", 0, "'(' cannot begin"),
        ("ram/lz4", 3, "'/' cannot follow the name 'ram'"),
        ("ram:lz4?", 8, "name of an option is expected"),
        ("ram:lz4?limit=1&", 16, "name of an option is expected"),
        ("ram:lz4?=1", 8, "name of an option is expected"),
        ("ram:lz4?limit", 13, "write limit=..."),
        ("tier?fast::ram:lz4", 9, "write fast=..."),
        ("ram:lz4?data-digest=on", 12, "'-' cannot be in the name of an option"),
        ("ram:lz4?a=1&a=2", 12, "given twice"),
        ("ram:lz4?a=1?b=2", 11, "written %3F"),
        ("ram:50%", 6, "write %25"),
        ("ram:lz4?limit=50%", 16, "write %25"),
        ("file:/a%zz", 7, "write %25"),
    ],
)
def test_stacks_that_do_not_read(url: str, position: int, said: str) -> None:
    error = refusal(lambda: parse_store_url(url, stores=STORES, filters=FILTERS))
    assert said in str(error)
    assert error.position == position
    assert f"character {position + 1} of" in str(error)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("ram", "'ram:lz4' or 'ram:zstd'"),
        ("zstd", "'ram:zstd'"),
        ("zst", "'ram:zstd'"),
        ("memory", "'memory:'"),
        ("ram?limit=1GiB", None),
        ("floppy", None),
    ],
)
def test_a_bare_word_is_told_the_whole_url(word: str, meant: str | None) -> None:
    examples = ("ram:lz4", "ram:zstd", "memory:")
    error = refusal(lambda: parse_store_url(word, stores=STORES, examples=examples))
    assert (f"did you mean {meant}?" in str(error)) == (meant is not None), error
    assert meant or "lacks its colon" in str(error)


def test_without_names_any_name_will_do() -> None:
    assert parse_store_url("a::b:c").filters == (LayerSpec("a"),)


def test_an_empty_url_has_no_place_to_point_at() -> None:
    error = refusal(lambda: parse_store_url(""))
    assert "ram:lz4" in str(error)
    assert error.position is None


def test_an_error_stays_on_one_line_and_survives_pickling() -> None:
    error = refusal(lambda: parse_store_url("ram\nlz4:"))
    assert str(error).endswith("(character 4 of 'ram?lz4:')")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.position) == (str(error), error.position)


layer_names = st.from_regex(r"[a-z][a-z0-9+._-]{0,8}", fullmatch=True)
option_names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
values = st.text(st.sampled_from("ab:?&%=/ ,[]@\n\u00e9\udc80"), max_size=8) | st.text(max_size=8)
option_sets = st.dictionaries(option_names, values, max_size=3)
stacks = st.builds(
    StackSpec,
    st.lists(st.builds(LayerSpec, layer_names, st.just(""), option_sets), max_size=3).map(tuple),
    st.builds(LayerSpec, layer_names, values, option_sets),
)


@given(stacks)
def test_every_stack_reads_back(stack: StackSpec) -> None:
    assert parse_store_url(str(stack)) == stack


@given(st.text(st.sampled_from("ram:?&=%3F1_ \u00e9"), max_size=20))
def test_any_text_is_a_stack_or_a_grammar_error(url: str) -> None:
    try:
        stack = parse_store_url(url)
    except GrammarError as error:
        place = error.position or 0
    else:
        place = 0
        assert parse_store_url(str(stack)) == stack
    assert place <= len(url)


def test_a_url_survives_an_unquoted_shell_word() -> None:
    target = "/tmp/a b$HOME`x`;'\"*|<>#~(){}!\\"
    url = str(StackSpec((), LayerSpec("file", target)))
    echoed = subprocess.run(["sh", "-c", f"echo {url}"], capture_output=True, text=True, check=True)
    assert parse_store_url(echoed.stdout.rstrip("\n")).store.target == target


def options(text: str) -> Options:
    return Options(parse_store_url(f"ram:lz4{text}").store)


def test_options_are_read_by_type_or_have_their_default() -> None:
    reader = options("?limit=2M&share=50%25&wait=5ms&sync=on&level=-3&codec=zstd&note=hi")
    assert reader.size("limit", None) == 2 * MIB
    assert reader.size("share", None, whole=10) == 5
    assert reader.duration("wait", 1.0) == 0.005
    assert reader.boolean("sync", False) is True
    assert reader.integer("level", 1, low=-5, high=22) == -3
    assert reader.choice("codec", "lz4", ("lz4", "zstd")) == "zstd"
    assert reader.text("note", None) == "hi"
    assert reader.size("absent", None) is None
    assert reader.boolean("absent", True) is True
    reader.finish()


@pytest.mark.parametrize(
    ("text", "read", "position", "said"),
    [
        ("?limit=2MB", lambda o: o.size("limit", None), 14, "ram: option limit: '2MB' is ambig"),
        ("?wait=5", lambda o: o.duration("wait", None), 13, "ram: option wait: '5' is not"),
        ("?sync=yes", lambda o: o.boolean("sync", None), 13, "write on"),
        ("?level=23", lambda o: o.integer("level", 1, low=1, high=22), 14, "from 1 to 22"),
        ("?level=x", lambda o: o.integer("level", 1, low=1, high=22), 14, "from 1 to 22"),
        ("?codec=lz5", lambda o: o.choice("codec", "", ("lz4", "none")), 14, "mean 'lz4'?"),
    ],
)
def test_a_bad_option_is_pointed_at(
    text: str, read: Callable[[Options], object], position: int, said: str
) -> None:
    error = refusal(lambda: read(options(text)))
    assert said in str(error)
    assert error.position == position


def test_an_option_that_nobody_reads_is_refused() -> None:
    reader = options("?level=3&limt=1G")
    reader.integer("level", 1, low=1, high=22)
    reader.size("limit", None)
    error = refusal(reader.finish)
    assert "ram: unknown option 'limt'; did you mean 'limit'?" in str(error)
    assert error.position == 16


def test_no_message_shows_a_password() -> None:
    spec = parse_store_url("redis://me:secret@host:1/0?prefix=a")
    message = str(spec.store.error("does not belong here"))
    assert "secret" not in message
    assert "redis://me:***@host:1/0?prefix=a" in message
    assert without_password("file:/a:b@c") == "file:/a:b@c"
