"""`userswap trace import`: a trace of ours from a file of touches in oracleGeneral."""

from __future__ import annotations

import argparse
import json

from userswap.engine.traces import Writer, read_oracle

SCHEMA = "userswap.trace.import/1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a trace of a file in oracleGeneral, the format of libCacheSim. Sizes are left aside: "
        "each number is a page. Numbers too large for pages are squeezed: neighbours stay so."
    )
    parser.epilog = "examples:\n  userswap trace import blocks.oracleGeneral.bin blocks.trace"
    parser.add_argument("source", metavar="FILE")
    parser.add_argument("trace", metavar="TRACE")


def run(arguments: argparse.Namespace) -> int:
    found = read_oracle(arguments.source)
    with Writer(arguments.trace, found.head) as writer:
        writer.write(found.records)
    if arguments.json:
        document = {"schema": SCHEMA, "trace": arguments.trace, "touches": len(found.records)}
        print(json.dumps(document, indent=2))
    else:
        print(f"{arguments.trace} has {len(found.records):,} touches")
    return 0
