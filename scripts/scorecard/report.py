"""Writes the table in Markdown, and a line for each cell that is not a pass."""

from collections import Counter
from collections.abc import Mapping, Sequence

from .client import Shape
from .judge import Grade, Verdict
from .rows import Fault

Cell = Mapping[Shape, Verdict]
# The verdicts of each gateway, by its title and the name of the fault.
Results = Mapping[str, Mapping[str, Cell]]


def table(faults: Sequence[Fault], results: Results) -> str:
    """The table, its totals, and the reasons."""
    titles = list(results)
    lines = [_row(["fault of the first engine", *titles]), _row(["---"] * (len(titles) + 1))]
    for fault in faults:
        cells = [_cell(results[title].get(fault.name, {})) for title in titles]
        lines.append(_row([fault.name, *cells]))
    lines.append(_row(["**requests**", *[_total(results[title]) for title in titles]]))
    for title in titles:
        reasons = list(_reasons(faults, results[title]))
        if reasons:
            lines += ["", f"{title}, where it did not pass:", "", *reasons]
    return "\n".join(lines) + "\n"


def progress(title: str, fault: Fault, cell: Cell) -> str:
    """One line about a fault that was played."""
    grades = ", ".join(f"{shape}: {verdict.grade.label}" for shape, verdict in cell.items())
    return f"{title}: {fault.name}: {grades}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell) -> str:
    grades = {verdict.grade for verdict in cell.values()}
    if len(grades) == 1:
        return grades.pop().label
    parts = []
    for grade in sorted(grades, reverse=True):
        shapes = [str(shape) for shape, verdict in cell.items() if verdict.grade is grade]
        parts.append(f"{grade.label} ({_join(shapes)})")
    return "; ".join(parts)


def _join(shapes: Sequence[str]) -> str:
    return " and ".join(shapes)


def _total(cells: Mapping[str, Cell]) -> str:
    grades = Counter(verdict.grade for cell in cells.values() for verdict in cell.values())
    return ", ".join(f"{grades[grade]} {grade.label}" for grade in sorted(Grade, reverse=True))


def _reasons(faults: Sequence[Fault], cells: Mapping[str, Cell]) -> list[str]:
    lines = []
    for fault in faults:
        reasons: dict[Verdict, list[str]] = {}
        for shape, verdict in cells.get(fault.name, {}).items():
            if verdict.grade is not Grade.PASS:
                reasons.setdefault(verdict, []).append(str(shape))
        for verdict, shapes in reasons.items():
            where = "" if len(shapes) == len(cells[fault.name]) else f" ({_join(shapes)})"
            lines.append(f"- {fault.name}{where}: {verdict.grade.label}. {verdict.reason}")
    return lines
