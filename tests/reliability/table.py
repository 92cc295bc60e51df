"""A pytest plugin that writes the results of the reliability tests as tables: what was injected, and what happened.

A test module that sets `PROMISE` gets a table under that heading, with a row for each of its tests. A test may record
two properties: `figure`, which says what was measured, and `fault`, which says what was injected and replaces the name
of the test. Tests that record the same fault share a row, which counts their figures.
"""

from collections import Counter
from pathlib import Path

import pytest

OUTCOMES = ("passed", "failed", "error", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the command line."""
    group = parser.getgroup("reliability")
    group.addoption("--reliability-table", type=Path, help="write the tables of docs/reliability.md into this file")
    group.addoption("--reliability-full", action="store_true", help="more kills, processes, images and steps")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each test of a promise what its row needs, in properties, which reach the report from any process."""
    for number, item in enumerate(items):
        promise = getattr(getattr(item, "module", None), "PROMISE", None)
        if promise is not None:
            fault, _, case = item.name.removesuffix("]").removeprefix("test_").partition("[")
            fault = fault.replace("_", " ") + (f": {case}" if case else "")
            item.user_properties += [("promise", promise), ("number", number), ("fault", fault)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the tables and writes them into a file, where the option asks for it."""
    path = config.getoption("reliability_table", None)
    if path is None:
        return
    reports = [report for outcome in OUTCOMES for report in terminalreporter.stats.get(outcome, [])]
    text = tables([report for report in reports if isinstance(report, pytest.TestReport)])  # none from collection
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    terminalreporter.section("reliability")
    terminalreporter.write_line(text)


def tables(reports: list[pytest.TestReport]) -> str:
    """Returns the results as Markdown, in the order in which the tests were collected."""
    rows: dict[str, dict[str, list[tuple[pytest.TestReport, str]]]] = {}
    for report in sorted(reports, key=lambda report: dict(report.user_properties).get("number", -1)):
        properties = dict(report.user_properties)
        if "promise" in properties:
            faults = rows.setdefault(properties["promise"], {})
            faults.setdefault(properties["fault"], []).append((report, properties.get("figure", "as expected")))
    lines = []
    for promise, faults in rows.items():
        lines += [f"## {promise}", "", "| fault | what happened | held |", "| --- | --- | --- |"]
        lines += [row(fault, results) for fault, results in faults.items()] + [""]
    return "\n".join(lines)


def row(fault: str, results: list[tuple[pytest.TestReport, str]]) -> str:
    """Returns one line of a table."""
    broken = [report for report, _ in results if report.failed]
    skipped = [report for report, _ in results if report.skipped]
    counts = Counter(figure for report, figure in results if report.passed)
    figures = list(counts) if len(results) == 1 else [f"{count} {figure}" for figure, count in counts.items()]
    figures += [f"{report.nodeid.rpartition('::')[2]}: {message(report)}" for report in broken]
    if skipped:
        count = f"{len(skipped)} " if len(results) > 1 else ""
        figures.append(f"{count}not tried: {skipped[0].longrepr[2].removeprefix('Skipped: ')}")
    held = "**no**" if broken else "yes" if counts else "-"
    cells = (fault, "; ".join(figures), held)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def message(report: pytest.TestReport) -> str:
    """Returns the first line of a failure."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).partition("\n")[0]
