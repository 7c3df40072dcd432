"""`userswap trace show`: what a trace has."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import islice
from typing import Any

from userswap.backends.grammar import format_size
from userswap.engine.traces import Kind, Outcome, Trace, read

SCHEMA = "userswap.trace.show/1"
PAGE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what a trace has: how many touches, of what, by whom, how answered."
    parser.epilog = (
        "examples:\n  userswap trace show run.trace\n  userswap trace show run.trace --records 20"
    )
    parser.add_argument("trace", metavar="TRACE")
    parser.add_argument(
        "--records", type=int, default=0, metavar="N", help="the first N records too"
    )


def run(arguments: argparse.Namespace) -> int:
    trace = read(arguments.trace)
    document = describe(arguments.trace, trace)
    rows = list(islice(trace.records, max(arguments.records, 0)))
    if arguments.json:
        document["records"] = [
            {
                "page": page,
                "thread": thread,
                "time_ns": time_ns,
                "kind": kind.name.lower(),
                "outcome": outcome.name.lower(),
            }
            for page, thread, time_ns, kind, outcome in rows
        ]
        print(json.dumps(document, indent=2))
        return 0
    print(as_text(document))
    start = trace.records.time_ns[0] if rows else 0
    for page, thread, time_ns, kind, outcome in rows:
        print(
            f"{(time_ns - start) / 1e3:14.3f} us  page {page:<10}  thread {thread:<8}"
            f"  {kind.name.lower():8}  {outcome.name.lower()}"
        )
    return 0


def describe(name: str, trace: Trace) -> dict[str, Any]:
    records = trace.records
    pages, phases = trace.touches()
    times = records.time_ns
    return {
        "schema": SCHEMA,
        "trace": name,
        "files": trace.files,
        "lost_bytes": trace.lost_bytes,
        "region_bytes": trace.head.pages * PAGE,
        "all_touches": trace.head.all_touches,
        "resident_bytes": trace.resident * PAGE,
        "touches": len(pages),
        "pages": len(set(pages)),
        "phases": len(phases),
        "threads": len(set(records.thread)),
        "seconds": (times[-1] - times[0]) / 1e9 if times else 0.0,
        "kinds": _counts(Kind, records.kind),
        "outcomes": _counts(Outcome, records.outcome),
    }


def _counts(names: type[Kind] | type[Outcome], column: bytearray) -> dict[str, int]:
    return {names(value).name.lower(): count for value, count in sorted(Counter(column).items())}


def as_text(document: dict[str, Any]) -> str:
    touched = format_size(document["pages"] * PAGE)
    files = f" in {document['files']} files" if document["files"] > 1 else ""
    told = (
        "all touches are in it"
        if document["all_touches"]
        else f"{format_size(document['resident_bytes'])} were resident meanwhile: touches of what"
        " was are not in it"
    )
    lines = [
        f"{document['trace']}: {document['touches']:,} touches of {document['pages']:,} pages"
        f" ({touched}), {document['threads']} threads, {document['seconds']:.3f} s{files}",
        f"region of {format_size(document['region_bytes'])}; {told}",
    ]
    for title in ("kinds", "outcomes"):
        counts = ", ".join(f"{name} {count:,}" for name, count in document[title].items())
        lines.append(f"{title}: {counts}")
    if document["phases"]:
        lines.append(f"phases: {document['phases']}")
    if document["lost_bytes"]:
        lines.append(
            f"{document['lost_bytes']:,} bytes after the last whole block are left aside: "
            "the writer was killed, or the file is damaged there"
        )
    return "\n".join(lines)
