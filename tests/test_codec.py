"""Compression: pages survive it, damage is noticed, and the libraries are found where they are."""

import os
import random
import subprocess
import sys
import threading

import pytest

from userswap.native import codecs, ffi, lib

PAGE = 4096
CODECS = ("lz4", "zstd")
# From Python 3.14 on the standard library has zstd, and no wheel brings it.
IN_WHEELS = CODECS if sys.version_info < (3, 14) else ("lz4",)


def text_page(rng: random.Random, noise: int) -> bytes:
    words = [b"page", b"store", b"fault", b"evict", b"resident"]
    return (rng.randbytes(noise) + b" ".join(rng.choices(words, k=PAGE // 5)))[:PAGE]


def compress(codec: str, page: bytes, room: int = PAGE) -> bytes:
    out = ffi.new(f"uint8_t[{room}]")
    length = lib.us_compress(codecs.open_codec(codec).number, 1, page, out, room)
    assert 0 <= length <= room
    return bytes(ffi.buffer(out, length))


def decompress(codec: str, data: bytes) -> bytes | int:
    page = ffi.new(f"uint8_t[{PAGE}]")
    rc = lib.us_decompress(codecs.open_codec(codec).number, data, len(data), page)
    return bytes(ffi.buffer(page)) if rc == 0 else int(rc)


@pytest.mark.parametrize("codec", CODECS)
def test_pages_survive(codec: str, seed: int) -> None:
    rng = random.Random(seed)
    for noise in range(0, 3000, 100):
        page = text_page(rng, noise)
        packed = compress(codec, page)
        assert 0 < len(packed) < PAGE
        assert decompress(codec, packed) == page


@pytest.mark.parametrize("codec", CODECS)
def test_what_does_not_fit_is_said_so(codec: str, seed: int) -> None:
    rng = random.Random(seed)
    assert compress(codec, rng.randbytes(PAGE)) == b""
    assert compress(codec, text_page(rng, 1000), room=900) == b""


@pytest.mark.parametrize("codec", CODECS)
def test_damage_never_goes_beyond_the_page(codec: str, seed: int) -> None:
    rng = random.Random(seed)
    packed = bytearray(compress(codec, text_page(rng, 500)))
    for _ in range(300):
        damaged = bytearray(packed)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        result = decompress(codec, bytes(damaged))
        assert isinstance(result, bytes) or result < 0
    assert decompress(codec, bytes(packed[:-1])) == -84  # EILSEQ
    assert decompress(codec, b"") == -84


def test_threads_do_not_share_their_working_memory(seed: int) -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        rng = random.Random(seed + number)
        for _ in range(200):
            codec, page = rng.choice(CODECS), text_page(rng, rng.randrange(2000))
            if decompress(codec, compress(codec, page)) != page:
                wrong.append(codec)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("codec", CODECS)
def test_the_library_in_use_is_named(codec: str) -> None:
    opened = codecs.open_codec(codec)
    assert os.path.exists(opened.path)
    assert opened.version[0].isdigit()
    assert codecs.open_codec("none").path == ""
    with pytest.raises(ValueError, match="lz4"):
        codecs.open_codec("lz5")


def in_a_fresh_process(script: str) -> str:
    """A library once open stays so: what happens before needs a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", "from userswap.native import codecs\n" + script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout.strip()


@pytest.mark.parametrize("codec", IN_WHEELS)
def test_the_wheel_serves_where_the_system_has_none(codec: str) -> None:
    path = in_a_fresh_process(
        f"codecs._SYSTEM_NAMES['{codec}'] = 'libnowhere.so.1'\n"
        f"print(codecs.open_codec('{codec}').path)\n"
        "from userswap.native import ffi, lib\n"
        "out, page = ffi.new('uint8_t[4096]'), ffi.new('uint8_t[4096]')\n"
        f"number = codecs.open_codec('{codec}').number\n"
        "length = lib.us_compress(number, 1, bytes(range(256)) * 16, out, 4096)\n"
        "assert lib.us_decompress(number, out, length, page) == 0\n"
        "assert bytes(ffi.buffer(page)) == bytes(range(256)) * 16\n"
    )
    assert "site-packages" in path


@pytest.mark.parametrize("codec", CODECS)
def test_without_any_library_the_error_says_what_to_install(codec: str) -> None:
    message = in_a_fresh_process(
        f"codecs._SYSTEM_NAMES['{codec}'] = 'libc.so.6'\n"
        f"codecs._IN_WHEELS['{codec}'] = ('nowhere', '*.so')\n"
        f"try: codecs.open_codec('{codec}')\n"
        "except codecs.CodecError as error: print(error)\n"
    )
    assert "libc.so.6 lacks functions" in message
    assert f"apt-get install lib{codec}" in message
    assert "pip install" in message
