"""`nvme+tcp://host:port/NQN?nsid=1&...`: where a namespace is, and how it is spoken to.

Responsible for: every option, checked as it enters, and who this host says it is.
Must not know: sockets, the protocol's course, pages.

Options, in nvme-cli's words: `nsid=1`; `nr_io_queues=2`; `queue_size=128` (entries of each);
`hdr_digest=off` and `data_digest=off`; `keep_alive_tmo=5s` (0s: none); `disable_sqflow=off`;
`hostnqn=` and `hostid=` (those of /etc/nvme, else made of this machine's id);
`ctrl_loss_tmo=10min`, how long everybody waits for a lost target (`off`: for ever);
`reconnect_delay=1s` between attempts to reach it.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path as FilePath

from userswap.backends.grammar import GrammarError, LayerSpec, Options, parse_duration
from userswap.backends.nvme_tcp import qpair
from userswap.backends.nvme_tcp.controller import Settings
from userswap.backends.nvme_tcp.host import DEFAULT_PORT, address_text
from userswap.backends.nvme_tcp.identify import DISCOVERY_NQN
from userswap.backends.nvme_tcp.reconnect import Patience

NQN_BYTES = 223
QUEUES_MAX = 64
KEEP_ALIVE_MAX_S = 3600.0
DELAY_MIN_S, DELAY_MAX_S = 0.01, 3600.0
LOSS_TMO_S = 600.0
_TARGET = re.compile(r"//(\[[0-9A-Fa-f:.]+(?:%[^]/]+)?\]|[^][:/@?%\s]+)(?::([0-9]{1,5}))?/(.*)")
_NQN = re.compile(r"nqn\.[0-9]{4}-(?:0[1-9]|1[0-2])\.[!-~]+")
_IDENTITY = FilePath("/etc/nvme")
_MACHINE_ID = FilePath("/etc/machine-id")
_OF_USERSWAP = uuid.UUID("5f0f9c3e-6c1b-4c52-9a53-2b1b5a0d6f11")


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says."""

    address: tuple[str, int]
    settings: Settings
    patience: Patience

    @property
    def name(self) -> str:
        """As messages call it."""
        settings = self.settings
        return f"namespace {settings.nsid} of {settings.subsystem} at {address_text(self.address)}"


def parse_place(layer: LayerSpec) -> Place:
    """Read a URL; what is wrong with it is a GrammarError that points at it."""
    address, subsystem = _target(layer)
    options = Options(layer)
    nsid = options.integer("nsid", 1, low=1, high=0xFFFF_FFFE)
    queues = options.integer("nr_io_queues", 2, low=1, high=QUEUES_MAX)
    entries = options.integer("queue_size", 128, low=16, high=1024)
    header_digest = options.boolean("hdr_digest", default=False)
    data_digest = options.boolean("data_digest", default=False)
    no_flow_control = options.boolean("disable_sqflow", default=False)
    keep_alive = options.duration("keep_alive_tmo", 5.0)
    host, host_id = _host(layer, options.text("hostnqn", None), options.text("hostid", None))
    loss_tmo = _loss_tmo(layer, options.text("ctrl_loss_tmo", None))
    delay = options.duration("reconnect_delay", 1.0)
    options.finish()
    if keep_alive and not 1.0 <= keep_alive <= KEEP_ALIVE_MAX_S:
        raise layer.error("0s, which is none, or 1s to 1h", "keep_alive_tmo")
    if not DELAY_MIN_S <= delay <= DELAY_MAX_S:
        raise layer.error("10ms to 1h", "reconnect_delay")
    settings = Settings(
        subsystem=subsystem,
        host=host,
        host_id=host_id,
        nsid=nsid,
        queues=queues,
        entries=entries,
        keep_alive_tmo=keep_alive,
        flow_control=not no_flow_control,
        options=qpair.Options(header_digest=header_digest, data_digest=data_digest),
    )
    return Place(address, settings, Patience(loss_tmo, delay))


def default_host() -> tuple[str, bytes]:
    """NQN and id of this host: those that nvme-cli uses, or else ones that stay the same."""
    host, written_id = _line(_IDENTITY / "hostnqn"), _line(_IDENTITY / "hostid")
    machine = _line(_MACHINE_ID)
    own = uuid.uuid5(_OF_USERSWAP, machine) if machine else uuid.uuid4()
    if not is_nqn(host):
        host = f"nqn.2014-08.org.nvmexpress:uuid:{own}"
    try:
        return host, uuid.UUID(written_id).bytes
    except ValueError:
        return host, uuid.uuid5(_OF_USERSWAP, host).bytes


def is_nqn(text: str) -> bool:
    return bool(_NQN.fullmatch(text)) and len(text) <= NQN_BYTES


def _target(layer: LayerSpec) -> tuple[tuple[str, int], str]:
    match = _TARGET.fullmatch(layer.target)
    if not match or not 0 < int(match[2] or DEFAULT_PORT) <= 65535:
        raise layer.error("needs a namespace: nvme+tcp://host:4420/NQN?nsid=1")
    subsystem = match[3]
    if not is_nqn(subsystem):
        raise layer.error(f"'{subsystem}' is no NQN, such as nqn.2026-01.org.example:swap")
    if subsystem == DISCOVERY_NQN:
        raise layer.error("has no namespaces: `userswap nvme discover` asks it what there is")
    return (match[1].strip("[]"), int(match[2] or DEFAULT_PORT)), subsystem


def _host(layer: LayerSpec, nqn: str | None, host_id: str | None) -> tuple[str, bytes]:
    host, number = default_host()
    if nqn is not None:
        if not is_nqn(nqn):
            raise layer.error(f"'{nqn}' is no NQN, such as nqn.2026-01.org.example:me", "hostnqn")
        # A host that has another name is another host.
        host, number = nqn, uuid.uuid5(_OF_USERSWAP, nqn).bytes
    if host_id is not None:
        try:
            number = uuid.UUID(host_id).bytes
        except ValueError:
            raise layer.error(f"'{host_id}' is no UUID", "hostid") from None
        if not any(number):
            raise layer.error("a UUID of zeros names no host", "hostid")
    return host, number


def _loss_tmo(layer: LayerSpec, text: str | None) -> float | None:
    if text is None:
        return LOSS_TMO_S
    if text == "off":
        return None
    try:
        return parse_duration(text)
    except GrammarError as error:
        raise layer.error(f"{error.message}; or off", "ctrl_loss_tmo") from None


def _line(path: FilePath) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
