"""What was tried, below the results."""

from tests.fuzz.budget import REFUSED, TRIED


def pytest_terminal_summary(terminalreporter):
    for kind, count in TRIED.items():
        terminalreporter.write_line(f"fuzz: {count} {kind}, {REFUSED[kind]} refused in one line")
