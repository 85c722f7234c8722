"""`capfilt doctor` and `capfilt --version`: what is installed, and what is there to work with."""

from __future__ import annotations

from itertools import groupby

import typer

from capfilt.cli.console import clean, note, say, say_json
from capfilt.cli.options import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Look at packages, devices, models and disks, and say what lacks. Exit code 1 where capfilt cannot work."""
    from capfilt.doctor import FINE, diagnose

    found = diagnose()
    if as_json:
        say_json(found)
        raise typer.Exit(found.exit_code)
    width = max(len(finding.name) for finding in found.findings)
    for section, findings in groupby(found.findings, lambda finding: finding.section):
        say(section)
        for finding in findings:
            say(f"  {finding.state:<7} {clean(finding.name):<{width}}  {clean(finding.found, 500)}")
            if finding.remedy and finding.state != FINE:
                say(f"  {'':<7} {'':<{width}}  {clean(finding.remedy, 500)}")
    say(found.line())
    if found.exit_code == 0:
        note("Next: capfilt run quickstart")
    raise typer.Exit(found.exit_code)


def print_version(value: bool) -> None:
    """The callback of `--version`."""
    if value:
        from capfilt.doctor import version_lines

        for line in version_lines():
            say(line)
        raise typer.Exit
