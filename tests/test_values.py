"""Values: blocks survive every way of writing them, short ones get short, damage is noticed."""

import itertools
import random
import struct
import threading

import pytest

from userswap.backends.grammar import GrammarError, LayerSpec, Options
from userswap.backends.values import (
    BLOCK_SIZE,
    SHUFFLES,
    VALUE_MAX,
    ZEROS,
    Codec,
    codec_option,
)
from userswap.native import codecs, ffi, lib

WAYS = [
    (name, shuffle)
    for name, shuffle in itertools.product(codecs.NAMES, SHUFFLES)
    if name != "none" or shuffle == "off"
]


def int64s(rng: random.Random) -> bytes:
    return struct.pack("<512q", *(rng.randrange(100_000) for _ in range(512)))


def row_of_int32s(rng: random.Random) -> bytes:
    """Column indices of a sparse matrix: sorted in each of its rows."""
    rows = (sorted(rng.sample(range(3000), 32)) for _ in range(32))
    return struct.pack("<1024i", *itertools.chain.from_iterable(rows))


def text(rng: random.Random) -> bytes:
    words = [b"page", b"store", b"fault", b"evict", b"resident"]
    return b" ".join(rng.choices(words, k=BLOCK_SIZE))[:BLOCK_SIZE]


def blocks(seed: int) -> list[bytes]:
    rng = random.Random(seed)
    noise = rng.randbytes(BLOCK_SIZE)
    return [
        bytes(BLOCK_SIZE),
        b"abcd" * (BLOCK_SIZE // 4),
        b"abcd" * (BLOCK_SIZE // 4 - 1) + b"abce",
        noise,
        noise[:3000] + bytes(BLOCK_SIZE - 3000),
        int64s(rng),
        row_of_int32s(rng),
        text(rng),
    ]


def decoded(codec: Codec, value: bytes) -> bytes:
    place = bytearray(b"\xaa" * BLOCK_SIZE)
    with memoryview(place) as view:
        codec.decode(value, view)
    return bytes(place)


@pytest.mark.parametrize(("name", "shuffle"), WAYS)
def test_blocks_survive_and_any_codec_reads_them(name: str, shuffle: str, seed: int) -> None:
    codec, other = Codec(name, shuffle=shuffle), Codec("none")
    for block in blocks(seed):
        for buffer in (block, bytearray(block), memoryview(block)):
            value = codec.encode(buffer)
            assert len(value) <= VALUE_MAX
            assert decoded(codec, value) == decoded(other, value) == block


@pytest.mark.parametrize("name", codecs.NAMES)
def test_a_pattern_is_five_bytes_and_noise_is_kept_as_it_is(name: str, seed: int) -> None:
    codec = Codec(name)
    assert codec.encode(bytes(BLOCK_SIZE)) == ZEROS
    assert len(codec.encode(b"wxyz" * (BLOCK_SIZE // 4))) == len(ZEROS)
    noise = random.Random(seed).randbytes(BLOCK_SIZE)
    assert codec.encode(noise) == b"\0" + noise


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_numbers_shuffled_get_three_times_shorter(name: str, seed: int) -> None:
    rng = random.Random(seed)
    block = int64s(rng)
    length = {shuffle: len(Codec(name, shuffle=shuffle).encode(block)) for shuffle in SHUFFLES}
    assert length["auto"] == length["8"] < BLOCK_SIZE / 3 < length["off"]
    block = row_of_int32s(rng)
    length = {shuffle: len(Codec(name, shuffle=shuffle).encode(block)) for shuffle in SHUFFLES}
    assert length["auto"] <= length["4"] * 1.1 < BLOCK_SIZE / 2
    assert length["auto"] < 0.8 * length["off"]


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_what_a_shuffle_would_make_longer_is_not_shuffled(name: str, seed: int) -> None:
    rng = random.Random(seed)
    # Every second word is the same: what lz4 finds in whole records, a shuffle takes apart.
    records = b"".join(struct.pack("<IIQ", rng.getrandbits(32), 0, 7) for _ in range(256))
    for block in (text(rng), records):
        assert Codec(name).encode(block) == Codec(name, shuffle="off").encode(block)


def test_words_go_where_their_bytes_belong(seed: int) -> None:
    page = random.Random(seed).randbytes(BLOCK_SIZE)
    out, back = ffi.new("uint8_t[4096]"), ffi.new("uint8_t[4096]")
    for width in (4, 8):
        lib.us_shuffle(width, page, out)
        planes = [page[place::width] for place in range(width)]
        assert bytes(ffi.buffer(out)) == b"".join(planes)
        lib.us_unshuffle(width, out, back)
        assert bytes(ffi.buffer(back)) == page


@pytest.mark.parametrize(("name", "shuffle"), WAYS)
def test_damage_is_an_error_or_stays_in_the_block(name: str, shuffle: str, seed: int) -> None:
    rng = random.Random(seed)
    codec = Codec(name, shuffle=shuffle)
    guarded = bytearray(b"\xee" * (BLOCK_SIZE + 128))
    place = memoryview(guarded)[64 : 64 + BLOCK_SIZE]
    for block in blocks(seed):
        value = codec.encode(block)
        for _ in range(40):
            damaged = bytearray(value)
            damaged[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
            try:
                codec.decode(damaged[: rng.choice((len(value), rng.randrange(len(value))))], place)
            except ValueError:
                continue
        for cut in (value[:-1], value[:1], b"", value + b"\0" * VALUE_MAX):
            with pytest.raises(ValueError, match="bytes that are not the value of a block"):
                codec.decode(cut, place)
        for tag in (0x03, 0x1F, 0x31, 0xF2, 0x80):
            with pytest.raises(ValueError, match="not the value"):
                codec.decode(bytes((tag,)) + value[1:], place)
    assert guarded[:64] == guarded[-64:] == b"\xee" * 64


def test_threads_may_share_a_codec(seed: int) -> None:
    wrong: list[bytes] = []
    codec = Codec("zstd")

    def work(number: int) -> None:
        for block in blocks(seed + number) * 20:
            if decoded(codec, codec.encode(block)) != block:
                wrong.append(block)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def option(**given: str) -> Codec:
    options = Options(LayerSpec("lmdb", "/tmp/x", given))
    codec = codec_option(options)
    options.finish()
    return codec


def test_options() -> None:
    assert option().description == "zstd level 1, shuffle auto"
    assert option(level="-5", shuffle="4").description == "zstd level -5, shuffle 4"
    assert option(codec="lz4", shuffle="off").description == "lz4, shuffle off"
    assert option(codec="none").name == "none"
    for wrong in (
        {"codec": "gzip"},
        {"shuffle": "16"},
        {"level": "23"},
        {"codec": "lz4", "level": "3"},
        {"codec": "none", "shuffle": "8"},
    ):
        with pytest.raises(GrammarError):
            option(**wrong)
