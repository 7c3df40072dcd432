"""`userswap doctor`: what this kernel and this user may do, what follows, and how to get more.

Gathers facts and prints what engine/findings.py makes of them, as a table or as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from dataclasses import asdict
from typing import Any

import userswap
from userswap.engine import machine, probe
from userswap.engine.findings import Finding, Report, examine
from userswap.engine.machine import Machine
from userswap.engine.probe import Facts, Service

SCHEMA = "userswap.doctor/1"
HEADLINES = {
    "full": "full service",
    "user_mode_only": "limited service: user-mode faults only, with Region(user_mode_only=True)",
    "none": "no service",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what this kernel and this user may do, what userswap will use and why, and the "
        "remedy for whatever is missing. Everything is tried, nothing is changed."
    )
    parser.epilog = (
        "exit code: 0 full service, 1 limited service, 3 none\n\n"
        "examples:\n"
        "  userswap doctor\n"
        "  userswap doctor --problems          only what is limited or missing\n"
        "  userswap doctor --json | jq .service\n"
        "  setpriv --reuid 65534 --clear-groups userswap doctor    what another user would get"
    )
    parser.add_argument(
        "--problems", action="store_true", help="show only what is limited or missing"
    )


def run(arguments: argparse.Namespace) -> int:
    facts, surroundings = probe.gather(), machine.gather()
    report = examine(facts, surroundings)
    if arguments.json:
        print(json.dumps(as_json(report, facts, surroundings), indent=2))
    else:
        print(as_text(report, facts, shutil.get_terminal_size().columns, arguments.problems))
    return report.exit_code


def as_json(report: Report, facts: Facts, surroundings: Machine) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": userswap.__version__,
        "service": report.service._asdict(),
        "summary": summary(report),
        "exit_code": report.exit_code,
        "findings": [asdict(finding) for finding in report.findings],
        "facts": asdict(facts),
        "machine": asdict(surroundings),
    }


def summary(report: Report) -> str:
    service: Service = report.service
    line = f"{HEADLINES[service.level]} ({service.reason})"
    if service.level == "full" and report.shortcomings:
        lacking = ", ".join(finding.topic for finding in report.shortcomings)
        line = f"limited service: {lacking} ({service.reason})"
    return line


def as_text(report: Report, facts: Facts, columns: int, problems_only: bool) -> str:
    lines = [f"userswap {userswap.__version__} on Linux {facts.kernel}, user {facts.user}", ""]
    shown = [each for each in report.findings if not problems_only or each.status != "ok"]
    topics = max((len(finding.topic) for finding in shown), default=0)
    for finding in shown:
        lines += _entry(finding, topics, max(columns, topics + 40))
    if shown:
        lines.append("")
    results = {"result": summary(report), "remedy": report.service.remedy}
    for word, text in results.items():
        if text:
            lines += textwrap.wrap(f"{word}: {text}", columns, subsequent_indent="        ")
    return "\n".join(lines)


def _entry(finding: Finding, topics: int, columns: int) -> list[str]:
    """The fact and what follows from it; under them what would help."""
    lead = f"{finding.status:8}{finding.topic:{topics}}  "
    indent = " " * len(lead)
    text = f"{finding.fact} -> {finding.use}"
    lines = textwrap.wrap(text, columns, initial_indent=lead, subsequent_indent=indent)
    if finding.remedy:
        remedy = f"remedy: {finding.remedy}"
        lines += textwrap.wrap(remedy, columns, initial_indent=indent, subsequent_indent=indent)
    return lines
