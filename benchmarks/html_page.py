"""Reports as one HTML file that needs nothing else, and tables as Markdown."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; font-size: 12px; display: block; overflow-x: auto; }}
th, td {{ padding: 2px 8px; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
tr.first td {{ border-top: 1px solid #999; }}
svg {{ width: 100%; height: auto; }}
code {{ background: #f4f4f4; }}
</style>
<h1>{title}</h1>
{body}
<h2>What was measured on what</h2>
<ul>{notes}</ul>
<pre>{command}</pre>
</html>
"""


def page(title: str, body: Iterable[str], notes: Iterable[str], command: dict[str, Any]) -> str:
    """A report: its parts, which are HTML, what they mean, and the arguments that made it."""
    return _PAGE.format(
        title=html.escape(title),
        body="".join(body),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in notes),
        command=html.escape(json.dumps(command, indent=1)),
    )


def table(title: str, cells: list[list[str]]) -> str:
    """A table under a heading, its first row the header; a line parts rows whose first cells differ."""
    head, *rows = cells
    body, last = [], ""
    for row in rows:
        columns = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body.append(f'<tr class="{"first" if row[0] != last else ""}">{columns}</tr>')
        last = row[0]
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    heading = f"<h2>{html.escape(title)}</h2>" if title else ""
    return f"{heading}<table><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def picture(svg: str) -> str:
    """An SVG file's drawing, without what only a file of its own may begin with."""
    return svg[svg.index("<svg") :]


def markdown_table(cells: list[list[str]]) -> str:
    head, *rows = cells
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
