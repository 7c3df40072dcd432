"""`userswap trace export`: a trace in oracleGeneral, for libCacheSim and its relatives."""

from __future__ import annotations

import argparse
import json

from userswap.engine.errors import ConfigError
from userswap.engine.traces import Kind, read, write_oracle

SCHEMA = "userswap.trace.export/1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a trace's touches in oracleGeneral, the format of libCacheSim."
    parser.epilog = "examples:\n  userswap trace export run.trace run.oracleGeneral.bin"
    parser.add_argument("trace", metavar="TRACE")
    parser.add_argument("target", metavar="FILE")


def run(arguments: argparse.Namespace) -> int:
    trace = read(arguments.trace)
    pages, _ = trace.touches()
    if not pages:
        raise ConfigError(f"{arguments.trace} has no touches")
    start = trace.records.time_ns[0]
    times = (
        time_ns - start
        for time_ns, kind in zip(trace.records.time_ns, trace.records.kind, strict=True)
        if kind not in (Kind.PHASE, Kind.RESIDENT)
    )
    write_oracle(arguments.target, pages, times)
    if arguments.json:
        document = {"schema": SCHEMA, "file": arguments.target, "touches": len(pages)}
        print(json.dumps(document, indent=2))
    else:
        print(f"{arguments.target} has {len(pages):,} touches")
    return 0
