"""Prints what the doctor found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from kvist.doctor.checks import ERROR, WARNING, check
from kvist.doctor.collect import collect
from kvist.doctor.facts import Finding, Wants
from kvist.wording import amount


def run_doctor(wants: Wants, *, as_json: bool) -> int:
    """Check this machine and print the findings; return 1 if there is an error, else 0."""
    findings = check(wants, collect(wants))
    print(as_object(findings) if as_json else as_lines(findings), flush=True)
    return 1 if any(finding.level == ERROR for finding in findings) else 0


def as_lines(findings: Sequence[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.subject:<14} {finding.text}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<14} → {finding.remedy}")
    return "\n".join([*lines, ", ".join(amount(_count(findings, level), level) for level in (ERROR, WARNING))])


def as_object(findings: Sequence[Finding]) -> str:
    rows = [dataclasses.asdict(finding) for finding in findings]
    counts = {"errors": _count(findings, ERROR), "warnings": _count(findings, WARNING)}
    return json.dumps({**counts, "findings": rows}, indent=1, ensure_ascii=False)


def _count(findings: Sequence[Finding], level: str) -> int:
    return sum(finding.level == level for finding in findings)
