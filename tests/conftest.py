"""Counts what ran: a suite that silently skipped its end-to-end tests would otherwise look green."""

from __future__ import annotations

import pytest

KINDS = ("golden", "end_to_end", "fault", "containers")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--at-least",
        action="append",
        default=[],
        metavar="KIND=COUNT",
        help=f"fail unless so many tests of a kind passed ({', '.join(KINDS)})",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = _passed(terminalreporter)
    terminalreporter.write_line("passed by kind: " + ", ".join(f"{kind} {count}" for kind, count in counts.items()))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    counts = _passed(reporter)
    for wish in session.config.getoption("at_least"):
        kind, _, least = wish.partition("=")
        if counts[kind] < int(least):
            reporter.write_line(f"only {counts[kind]} tests marked {kind} passed, expected at least {least}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _passed(reporter: pytest.TerminalReporter) -> dict[str, int]:
    reports = reporter.stats.get("passed", [])
    return {kind: sum(kind in report.keywords for report in reports) for kind in KINDS}
