"""Pieces of the report's page: text made safe, tables, cards of a chart with its numbers behind it."""

from html import escape
from typing import Any

NONE = "–"


class Html(str):
    """Text that is HTML already."""


def cell(value: Any) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def number(value: float | None, form: str = ".4f") -> str:
    """With a true minus sign, or a dash for None."""
    return NONE if value is None else format(value, form).replace("-", "−")


def table(head: list[Any], rows: list[list[Any]], caption: str, *, words: bool = False, shown: bool = False) -> str:
    """A table whose first column heads its rows, in a box that scrolls by itself and takes the keyboard's focus."""
    top = "".join(f'<th scope="col">{cell(value)}</th>' for value in head)
    body = "\n".join(
        f'<tr><th scope="row">{cell(first)}</th>' + "".join(f"<td>{cell(value)}</td>" for value in rest) + "</tr>"
        for first, *rest in rows
    )
    kind, of = "scroll open" if shown else "scroll", "words" if words else "numbers"
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="{of}"><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def details(summary: str, content: str, *, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>\n{content}</details>"


def chart(key: str, title: str, alt: str, caption: str, data: str) -> str:
    """A card for the script to draw chart ``key`` in; ``alt`` says in words what is to be seen, ``data`` are its tables."""
    return (
        f'<figure aria-labelledby="{key}-title" aria-describedby="{key}-alt"><h3 id="{key}-title">{escape(title)}</h3>\n'
        f'<p id="{key}-alt" class="unseen">{escape(alt)}</p><div class="plot" data-chart="{key}"></div>\n'
        f"<figcaption>{escape(caption)}</figcaption>\n{details('The numbers', data)}</figure>"
    )


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def cards(*parts: str) -> str:
    return '<div class="cards">\n' + "\n".join(parts) + "\n</div>"
