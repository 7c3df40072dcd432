"""How values are written: sizes, durations, booleans and the URLs of store stacks.

Responsible for: turning what a user typed into values, and for errors that say where it went wrong
and what was probably meant. Everything that reads such values reads them here, so that a size means
the same in a URL, on the command line and in Python.

Must not know: which stores and filters exist (callers pass the names), or what an option means.

    filter?option=value&option=value::filter::scheme:target?option=value

A stack is read from left to right, outermost first. A name followed by `::`, or by `?...::`, is a
filter; the first name that is followed by a single `:` is the store, which takes the rest, so that
`::` may occur in its target. `?`, `&` and `%` inside a value or a target are percent-encoded, as is
`::` inside a filter's value.
"""

import difflib
import operator
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import SupportsIndex, TypeVar
from urllib.parse import quote, unquote

SIZE_MAX = 2**63 - 1  # what an off_t holds
DURATION_MAX = 1_000_000_000.0  # seconds, some thirty years: more is a slip of the hand

_SIZE_LETTERS = "BKMGTPE"  # the n-th stands for 1024**n
_SIZE_UNITS = {"B": 1} | {
    letter + suffix: 1024**power
    for power, letter in enumerate(_SIZE_LETTERS)
    if power
    for suffix in ("", "IB")
}
_DURATION_UNITS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 10**3),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([^0-9. ]*)")
_LAYER_NAME = re.compile(r"[a-z][a-z0-9+._-]*")
_OPTION_NAME = re.compile(r"[a-z][a-z0-9_]*")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PLAIN_CHARACTERS = "/:@+=,[]"

T = TypeVar("T")
V = TypeVar("V")


class GrammarError(ValueError):
    """Something that does not read; `str()` is one line, which names the place.

    `position` is the index in `text` of the first character that is wrong.
    """

    def __init__(self, message: str, text: str = "", position: int | None = None) -> None:
        super().__init__(message, text, position)
        self.message = message
        self.text = text
        self.position = position

    def __str__(self) -> str:
        if self.position is None:
            return _printable(self.message)
        place = f"character {self.position + 1} of '{without_password(self.text)}'"
        return _printable(f"{self.message} ({place})")


def without_password(url: str) -> str:
    """A URL as messages may show it, whatever it has after the user's name."""
    return re.sub(r"(//[^/@:\s]*):[^/@\s]*@", r"\1:***@", url)


def _printable(text: str) -> str:
    """One line, whatever the text holds."""
    return "".join(character if character.isprintable() else "?" for character in text)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that a name is unknown: with the nearest known one, or else with all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"unknown {kind} '{name}'; did you mean '{near[0]}'?"
    listed = ", ".join(names) if names else "none"
    return f"unknown {kind} '{name}'; there are: {listed}"


# --- sizes, durations, booleans ---


def _whole_bytes(value: object) -> int:
    """An integer, also numpy's; nothing that is merely close to one."""
    if not isinstance(value, bool) and isinstance(value, SupportsIndex):
        return operator.index(value)
    raise GrammarError(
        f"{value!r} is not a size: give bytes as an integer, or text such as 512MiB or 25%"
    )


def parse_size(value: str | int, *, whole: int | None = None) -> int:
    """Bytes. `512M` and `512MiB` are the same; a plain integer is bytes already.

    `50%` has a meaning only where `whole` says of what. Fractions of a byte are dropped.
    """
    if not isinstance(value, str):
        return _checked_size(Fraction(_whole_bytes(value)), str(value))
    text = value.strip()
    match = _quantity(text, "size", "512MiB")
    amount, unit = Fraction(match[1]), match[2]
    if unit == "%":
        return _share(amount, text, whole)
    if not unit:
        if amount.denominator != 1:
            raise GrammarError(f"'{text}' is not a size: it lacks a unit, such as MiB", text, 0)
        return _checked_size(amount, text)
    if unit.upper() in _SIZE_UNITS:
        return _checked_size(amount * _SIZE_UNITS[unit.upper()], text)
    place = match.start(2)
    if unit.upper().removesuffix("B") in _SIZE_UNITS:
        letter = unit[0].upper()
        meaning = f"{match[1]}{letter}iB, which is {match[1]} x 1024^{_SIZE_LETTERS.index(letter)}"
        raise GrammarError(
            f"'{text}' is ambiguous: sizes are binary here; write {meaning}", text, place
        )
    units = "K, M, G, T, P and E, each with or without iB"
    raise GrammarError(f"'{text}' is not a size: the units are {units}", text, place)


def _quantity(text: str, kind: str, example: str) -> re.Match[str]:
    match = _QUANTITY.fullmatch(text)
    if match:
        return match
    if not text:
        raise GrammarError(f"a {kind} is empty; write for example {example}")
    if text.startswith("-"):
        raise GrammarError(f"'{text}' is not a {kind}: it is negative", text, 0)
    if re.match(r"[0-9]+,[0-9]", text):
        hint = "the decimal sign is a point, and there are no separators"
        raise GrammarError(f"'{text}' is not a {kind}: {hint}", text, text.index(","))
    good = _QUANTITY.match(text)
    raise GrammarError(
        f"'{text}' is not a {kind}; write for example {example}", text, good.end(1) if good else 0
    )


def _share(percent: Fraction, text: str, whole: int | None) -> int:
    if whole is None:
        raise GrammarError(
            f"'{text}' means nothing here: there is no whole to take a share of", text, 0
        )
    if percent > 100:
        raise GrammarError(f"'{text}' is more than the whole", text, 0)
    return int(whole * percent / 100)


def _checked_size(size: Fraction, text: str) -> int:
    if size < 0:
        raise GrammarError(f"'{text}' is not a size: it is negative", text, 0)
    if size > SIZE_MAX:
        raise GrammarError(f"'{text}' is too large: the most is {SIZE_MAX} bytes", text, 0)
    return int(size)


def format_size(size: int) -> str:
    """A size as `parse_size` reads it: exact if it is whole in its unit, else to two decimals."""
    if size < 0:
        return f"-{format_size(-size)}"
    power = min((max(size, 1).bit_length() - 1) // 10, len(_SIZE_LETTERS) - 1)
    if round(size / 1024**power, 2) >= 1024 and power + 1 < len(_SIZE_LETTERS):
        power += 1  # 1023.999 MiB is better called 1 GiB
    number = f"{size / 1024**power:.2f}".rstrip("0").rstrip(".")
    return f"{number}{_SIZE_LETTERS[power]}{'iB' if power else ''}"


def parse_duration(value: str) -> float:
    """Seconds. The unit is required: ns, us, ms, s, min or h."""
    text = value.strip()
    match = _quantity(text, "duration", "5s or 10ms")
    amount, unit = Fraction(match[1]), match[2]
    if unit not in _DURATION_UNITS:
        hint = {
            "": "it lacks a unit, such as s or ms",
            "m": "'m' could be minutes or milliseconds; write min or ms",
        }.get(unit, f"units are {', '.join(_DURATION_UNITS)}")
        raise GrammarError(f"'{text}' is not a duration: {hint}", text, match.start(2))
    seconds = float(amount * _DURATION_UNITS[unit])
    if seconds > DURATION_MAX:
        raise GrammarError(f"'{text}' is too long: the most is {DURATION_MAX:.0f}s", text, 0)
    return seconds


def parse_boolean(value: str) -> bool:
    """`on` or `off`, nothing else."""
    if value in ("on", "off"):
        return value == "on"
    meant = {"true": "on", "yes": "on", "1": "on", "false": "off", "no": "off", "0": "off"}
    hint = f"write {meant.get(value.lower(), 'on or off')}"
    raise GrammarError(f"'{value}' is neither on nor off; {hint}", value, 0)


# --- stacks ---


@dataclass(frozen=True)
class LayerSpec:
    """One store or filter of a stack, its values decoded.

    `position` and `option_positions` (of the values) are places in `url`, for error messages.
    """

    name: str
    target: str = ""
    options: dict[str, str] = field(default_factory=dict)
    position: int = field(default=0, compare=False)
    url: str = field(default="", compare=False)
    option_positions: dict[str, int] = field(default_factory=dict, compare=False)

    def error(self, message: str, option: str | None = None) -> GrammarError:
        """An error about this layer, or about one option of it, that points at its place."""
        if option is None:
            return GrammarError(f"{self.name}: {message}", self.url, self.position)
        place = self.option_positions.get(option, self.position)
        return GrammarError(f"{self.name}: option {option}: {message}", self.url, place)


@dataclass(frozen=True)
class StackSpec:
    """A store under its filters, the outermost filter first. `str()` is a URL that reads back."""

    filters: tuple[LayerSpec, ...]
    store: LayerSpec

    def __str__(self) -> str:
        filters = "".join(_format_filter(layer) for layer in self.filters)
        target = quote(self.store.target, _PLAIN_CHARACTERS, errors="surrogateescape")
        if target.startswith(":"):
            target = "%3A" + target[1:]
        return f"{filters}{self.store.name}:{target}{_format_options(self.store)}"


def _format_options(layer: LayerSpec) -> str:
    pairs = (
        f"{name}={quote(value, _PLAIN_CHARACTERS, errors='surrogateescape')}"
        for name, value in layer.options.items()
    )
    return "?" + "&".join(pairs) if layer.options else ""


def _format_filter(layer: LayerSpec) -> str:
    options = _format_options(layer)
    # A colon before another colon, or before the separator, would end the filter too early.
    return layer.name + re.sub(":(?=:|&|$)", "%3A", options) + "::"


def parse_store_url(
    url: str,
    *,
    stores: Collection[str] | None = None,
    filters: Collection[str] | None = None,
    examples: Collection[str] = (),
) -> StackSpec:
    """Read a stack. Names are checked against `stores` and `filters` where these are given.

    `examples` are good URLs: who writes a word of one alone is told the whole.
    """
    _check_bare_word(url, examples)
    layers: list[LayerSpec] = []
    position = 0
    while True:
        name = _layer_name(url, position, layers)
        after = position + len(name)
        if url.startswith(":", after) and not url.startswith("::", after):
            break
        end = _end_of_filter(url, name, after)
        options, places = _parse_options(url, after, end)
        layers.append(LayerSpec(name, "", options, position, url, places))
        _check_name(layers[-1], "filter", filters, stores)
        position = end + 2
    question = url.find("?", after)
    end = question if question >= 0 else len(url)
    target = _decode(url, after + 1, end)
    options, places = _parse_options(url, end, len(url))
    store = LayerSpec(name, target, options, position, url, places)
    _check_name(store, "store", stores, filters)
    return StackSpec(tuple(layers), store)


def _check_bare_word(url: str, examples: Collection[str]) -> None:
    """A name alone is no URL, but says which one may be meant."""
    if not _LAYER_NAME.fullmatch(url):
        return
    words = {word for example in examples for word in example.split(":") if word}
    near = difflib.get_close_matches(url, sorted(words), n=1)
    meant = [repr(example) for example in examples if near and near[0] in example.split(":")]
    if meant:
        message = f"'{url}' is not a store URL; did you mean {' or '.join(meant)}?"
        raise GrammarError(message, url, len(url))


def _layer_name(url: str, position: int, layers: list[LayerSpec]) -> str:
    match = _LAYER_NAME.match(url, position)
    if match:
        return match[0]
    if position < len(url):
        character = url[position]
        hint = "; names are in lower case" if character.isupper() else ""
        raise GrammarError(
            f"'{character}' cannot begin the name of a store or filter{hint}", url, position
        )
    if layers:
        raise GrammarError(f"no store follows the filter '{layers[-1].name}'", url, position)
    raise GrammarError("a store URL is empty; write for example ram:lz4")


def _end_of_filter(url: str, name: str, after: int) -> int:
    """Where the `::` is that ends the filter whose name ends before `after`."""
    if after == len(url):
        message = f"'{name}' lacks its colon: a store is written '{name}:'"
        raise GrammarError(message, url, after)
    if url[after] not in "?:":
        message = f"'{url[after]}' cannot follow the name '{name}': a colon does"
        raise GrammarError(message, url, after)
    end = url.find("::", after)
    if end < 0:
        written = f"a store is written '{name}:?...', a filter '{name}?...::'"
        raise GrammarError(f"'{name}' lacks its colon: {written}", url, after)
    return end


def _check_name(
    layer: LayerSpec, kind: str, known: Collection[str] | None, others: Collection[str] | None
) -> None:
    """Refuse a name that is not among the `known` of its kind; `others` are of the other kind."""
    if known is None or layer.name in known:
        return
    if layer.name in (others or ()):
        other, colons = ("filter", "two colons") if kind == "store" else ("store", "one colon")
        message = f"'{layer.name}' is a {other}, not a {kind}: {colons} must follow it"
        raise GrammarError(message, layer.url, layer.position + len(layer.name))
    raise GrammarError(unknown_name(kind, layer.name, known), layer.url, layer.position)


def _parse_options(url: str, start: int, end: int) -> tuple[dict[str, str], dict[str, int]]:
    """What url[start:end], empty or beginning with `?`, says; and where each value is."""
    options: dict[str, str] = {}
    places: dict[str, int] = {}
    position = start
    while position < end:
        position += 1  # past the `?` or `&`
        stop = url.find("&", position, end)
        stop = stop if stop >= 0 else end
        match = _OPTION_NAME.match(url, position, stop)
        if not match:
            raise GrammarError("the name of an option is expected here", url, position)
        name, equals = match[0], match.end()
        if equals == stop:
            raise GrammarError(f"option '{name}' has no value: write {name}=...", url, equals)
        if url[equals] != "=":
            message = f"'{url[equals]}' cannot be in the name of an option"
            raise GrammarError(message, url, equals)
        if name in options:
            raise GrammarError(f"option '{name}' is given twice", url, position)
        if "?" in url[equals:stop]:
            place = url.index("?", equals)
            raise GrammarError("'?' inside a value is written %3F", url, place)
        options[name] = _decode(url, equals + 1, stop)
        places[name] = equals + 1
        position = stop
    return options, places


def _decode(url: str, start: int, end: int) -> str:
    broken = _BROKEN_ESCAPE.search(url[start:end])
    if broken:
        message = "'%' begins an encoded character, such as %3F; write %25 for '%' itself"
        raise GrammarError(message, url, start + broken.start())
    return unquote(url[start:end], errors="surrogateescape")


class Options:
    """Reads the options of one layer by type; `finish` then refuses what nobody asked for.

    options = Options(layer)
    limit = options.size("limit", default=None)
    options.finish()
    """

    def __init__(self, layer: LayerSpec) -> None:
        self._layer = layer
        self._known: set[str] = set()

    def _read(self, name: str, default: T, parse: Callable[[str], V]) -> V | T:
        self._known.add(name)
        if name not in self._layer.options:
            return default
        try:
            return parse(self._layer.options[name])
        except GrammarError as error:
            raise self._layer.error(error.message, name) from None

    def text(self, name: str, default: T) -> str | T:
        return self._read(name, default, lambda value: value)

    def size(self, name: str, default: T, *, whole: int | None = None) -> int | T:
        return self._read(name, default, lambda value: parse_size(value, whole=whole))

    def duration(self, name: str, default: T) -> float | T:
        return self._read(name, default, parse_duration)

    def boolean(self, name: str, default: T) -> bool | T:
        return self._read(name, default, parse_boolean)

    def integer(self, name: str, default: T, *, low: int, high: int) -> int | T:
        def parse(value: str) -> int:
            if not re.fullmatch(r"-?[0-9]{1,18}", value) or not low <= int(value) <= high:
                raise GrammarError(f"'{value}' is not an integer from {low} to {high}")
            return int(value)

        return self._read(name, default, parse)

    def choice(self, name: str, default: T, choices: Collection[str]) -> str | T:
        def parse(value: str) -> str:
            if value not in choices:
                raise GrammarError(unknown_name("value", value, choices))
            return value

        return self._read(name, default, parse)

    def finish(self) -> None:
        """Refuse the first option that was not read."""
        for name in self._layer.options:
            if name not in self._known:
                place = self._layer.option_positions.get(name, self._layer.position)
                message = f"{self._layer.name}: {unknown_name('option', name, self._known)}"
                at = max(0, place - len(name) - 1)
                raise GrammarError(message, self._layer.url, at)
