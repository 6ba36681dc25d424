"""Keep rows in sheets, and sum them up."""

from dataclasses import dataclass
from typing import Any, List

from sekuire import TaskError, TaskRegistry

from .services import Sheet

tasks = TaskRegistry()


@dataclass
class NewSheet:
    columns: List[str]


@dataclass
class Rows:
    sheet_id: str
    rows: List[List[Any]]


@dataclass
class Column:
    sheet_id: str
    column: str


@tasks.task("sheets.create")
def create(ctx, input: NewSheet, *, sheets):
    """Create an empty sheet."""
    return sheets.add(f"sheet-{ctx.task_id}", Sheet(f"sheet-{ctx.task_id}", input.columns))


@tasks.task("sheets.append")
def append(ctx, input: Rows, *, sheets):
    """Add rows to a sheet, all or none of them."""
    sheet = sheets.get(input.sheet_id)
    for number, row in enumerate(input.rows):
        if len(row) != len(sheet.columns):
            raise TaskError(
                "wrong_row",
                f"rows[{number}] has {len(row)} cells, and the sheet has {len(sheet.columns)} columns",
                details={"row": number, "columns": sheet.columns},
            )
    with sheets.lock:
        sheet.rows.extend(input.rows)
    return {"rows": len(sheet.rows)}


@tasks.task("sheets.total")
def total(ctx, input: Column, *, sheets):
    """Sum up the numbers of a column."""
    sheet = sheets.get(input.sheet_id)
    if input.column not in sheet.columns:
        raise TaskError("no_such_column", f"the sheet has the columns {', '.join(sheet.columns)}")
    at = sheet.columns.index(input.column)
    with sheets.lock:
        return {"total": sum(row[at] for row in sheet.rows if isinstance(row[at], (int, float)))}
