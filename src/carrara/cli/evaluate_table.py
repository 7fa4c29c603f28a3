"""`carrara evaluate --table`: one model sampled in many ways, a file each, so that an interrupted table goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carrara.evaluation import Measurements
    from carrara.process import Schedule

GUIDANCE = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 7.5)
SOLVERS = ("ddpm", "ddim", "euler", "heun", "dpm++2m", "dpm++3m", "unipc", "deis", "plms")
TABLES = {"ddim": {"solver", "steps", "eta"}, "guidance": {"guidance"}, "solvers": {"solver", "steps", "eta"}}
"""The tables, and the options that each sets itself."""


@dataclass(frozen=True)
class Cell:
    """One way of sampling: its line and column, and what `DiffusionModel.sample` is told."""

    line: str
    column: str
    choices: dict[str, Any]

    @property
    def file(self) -> str:
        """Where its figures are kept."""
        return f"{self.line}, {self.column}.json".replace(" ", "_")


def cells(table: str, schedule: Schedule) -> list[Cell]:
    """The cells of a table, line by line.

    "ddim" is table 1 of Song et al. 2021: η, and the large noise σ̂, by the number of steps, T among them.
    """
    from carrara.solvers import DDIM

    if table == "guidance":
        return [Cell(f"guidance {scale:g}", "own steps", {"guidance": scale}) for scale in GUIDANCE]
    last = int(schedule.final_time)
    if table == "solvers":
        counts = [n for n in (5, 10, 20, 50) if n <= last]
        return [Cell(word, f"{n} steps", {"solver": word, "steps": n}) for word in SOLVERS for n in counts]
    lines = {f"η {eta:g}": DDIM(eta=eta) for eta in (0.0, 0.2, 0.5, 1.0)} | {"σ̂": DDIM(eta=1.0, noise="large")}
    counts = [*(n for n in (10, 20, 50, 100) if n < last), last]
    return [Cell(line, f"{n} steps", {"solver": solver, "steps": n}) for line, solver in lines.items() for n in counts]


def fill(
    folder: Path, plan: list[Cell], protocol: dict[str, Any], measure: Callable[[Cell], Measurements]
) -> list[tuple[Cell, Measurements]]:
    """The figures of every cell: those that `folder` holds are read, the others measured and kept there.

    Then `table.md` and `table.csv` are written.

    Args:
        protocol: what all cells share; a folder that was begun with another one is refused.

    Raises:
        UserError: the folder holds another table.
    """
    from carrara.errors import UserError
    from carrara.evaluation import stamp
    from carrara.files import write_whole

    header, begun = json.dumps(protocol, indent=2, sort_keys=True) + "\n", folder / "table.json"
    if begun.is_file() and begun.read_text(encoding="utf-8") != header:
        raise UserError(f"{begun} tells of a table of another protocol: give another --out folder.")
    write_whole(begun, header.encode())
    filled = []
    for cell in plan:
        path = folder / cell.file
        if not path.is_file():
            write_whole(path, (stamp.to_json(measure(cell)) + "\n").encode())
        filled.append((cell, stamp.load(path)))
    write_whole(folder / "table.md", markdown(filled, protocol).encode())
    write_whole(folder / "table.csv", comma_separated(filled).encode())
    return filled


def markdown(filled: list[tuple[Cell, Measurements]], protocol: dict[str, Any]) -> str:
    """The Fréchet distance with its interval, lines by columns, and the protocol below."""
    from carrara.evaluation.measure import frechet_name

    name = frechet_name(str(protocol["features"]))
    columns = list(dict.fromkeys(cell.column for cell, _ in filled))
    lines = [f"| {name} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for line in dict.fromkeys(cell.line for cell, _ in filled):
        found = {cell.column: figures[name] for cell, figures in filled if cell.line == line}
        shown = []
        for column in columns:
            figure = found[column]
            limits = figure.interval and f" ({figure.interval.low:.4g} … {figure.interval.high:.4g})"
            shown.append(f"{figure.value:.4g}{limits or ''}")
        lines.append(f"| {line} | " + " | ".join(shown) + " |")
    notes = dict.fromkeys(figures[name].note for _, figures in filled if figures[name].note)
    about = ", ".join(f"{key} {value}" for key, value in protocol.items() if value not in (None, ""))
    return "\n".join([*lines, "", f"95 % intervals; {about}.", *(f"{note}." for note in notes), ""])


def comma_separated(filled: list[tuple[Cell, Measurements]]) -> str:
    """Every figure of every cell, one a row."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["line", "column", "figure", "value", "low", "high"])
    for cell, figures in filled:
        for name, figure in figures.items():
            limits = ("", "") if figure.interval is None else (figure.interval.low, figure.interval.high)
            writer.writerow([cell.line, cell.column, name, figure.value, *limits])
    return text.getvalue()
