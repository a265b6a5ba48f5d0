"""One self-contained HTML page: text, tables, and figures inside the file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..files import write_text


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs of plain text, a table (the first row is its head), a PNG file and its caption; what is empty is left out."""

    title: str
    text: Sequence[str] = ()
    table: Sequence[Sequence[object]] = ()
    image: str | Path | None = None
    caption: str = ""

    def html(self) -> str:
        parts = [f"<h2>{escape(self.title)}</h2>", *(f"<p>{escape(paragraph)}</p>" for paragraph in self.text)]
        if self.table:
            head, *body = self.table
            parts.append(f"<table><thead>{_row(head, 'th')}</thead><tbody>{''.join(_row(row, 'td') for row in body)}</tbody></table>")
        if self.image is not None:
            data = base64.b64encode(Path(self.image).read_bytes()).decode()
            caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
            parts.append(f'<figure><img src="data:image/png;base64,{data}" alt="{escape(self.caption or self.title)}">{caption}</figure>')
        return "<section>" + "\n".join(parts) + "</section>"


def _row(cells: Sequence[object], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1rem }
h1 { margin-bottom: .2rem } h2 { margin-top: 2.5rem; font-size: 1.2rem } .lead { font-size: 1.15rem; margin-top: 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8884 }
th:first-child, td:first-child { text-align: left } figure { margin: 1rem 0 } img { max-width: 100%; background: white; border-radius: 4px }
figcaption { font-size: .9rem; opacity: .75 }
"""


def write_report(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all. Raises FileError if it cannot be written."""
    body = "\n".join(section.html() for section in sections)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(lead)}</p>\n{body}\n</body></html>\n',
    )
