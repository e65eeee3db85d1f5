"""Answers as pictures, drawn from an answer's document alone: nothing is shown that it does not say.

A picture names its world, since every number on it is relative to that. Points of theories are as dark as the theories are
probable; the answer over all theories is orange.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from fathom.errors import UserError

Values = dict[str, Any]
ALL, ONE, SHOWN = "#d55e00", "#0072b2", 15
"""Colours of the whole answer and of its parts (Okabe and Ito), and how many rows are drawn."""
_STYLE: dict[Any, Any] = {
    "font.size": 9.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "x", "grid.color": "#808080", "grid.alpha": 0.22,
    "legend.frameon": False, "svg.hashsalt": "fathom", "svg.fonttype": "none",
}  # fmt: skip


def save(document: Values, path: Path) -> None:
    """Draw an answer into an .svg, .png or .pdf file; the same answer gives the same picture.

    Raises:
        UserError: another ending, or an abstention: it has nothing to draw.
    """
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"{path}: a picture is an .svg, .png or .pdf file")
    if document["result"] is None:
        raise UserError("there is no answer to draw")
    figure = draw(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None} if path.suffix == ".pdf" else {}
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, metadata=metadata, dpi=160)


def draw(document: Values) -> Figure:
    """The figure of an answer."""
    result = document["result"]
    title, rows, paint = _PICTURES[document["verb"]](result, document["query"])
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(rect=(0, 0.04, 1, 0.96))
        figure = Figure((5.6, 1.4 + 0.3 * max(rows, 3)), layout=layout)
        axes = figure.subplots()
        paint(axes)
        figure.suptitle(_cut(title, 72), x=0.01, ha="left", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        figure.text(
            0.995, 0.005, f"world {document['world'][:12]}", ha="right", va="bottom", fontsize=7, color="#6b6b6b"
        )
    return figure


Picture = tuple[str, int, Callable[[Axes], None]]


def _rows(axes: Axes, names: list[str]) -> list[int]:
    places = list(range(len(names)))[::-1]
    axes.set_yticks(places, [_cut(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    return places


def _cut(name: str, most: int = 42) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 2]} … {name[1 - most // 2 :]}"


def _dark(p: float) -> float:
    """Opacity of a theory."""
    return 0.25 + 0.75 * p


def _theories(result: Values, _: Values) -> Picture:
    rows = result["theories"]

    def paint(axes: Axes) -> None:
        for place, row in zip(_rows(axes, [row["id"] for row in rows]), rows, strict=True):
            axes.barh(place, row["p"], 0.55, color=ONE, label="after" if row is rows[0] else None)
            axes.plot([row["prior"]] * 2, [place - 0.35, place + 0.35], color="#1d1f21", lw=1.5,
                      label="before the evidence" if row is rows[0] else None)  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_xlabel("probability of the theory")
        axes.legend(loc="lower right")

    return "How probable each theory is", len(rows), paint


def _prob(result: Values, query: Values) -> Picture:
    theories = result["epistemic"]["by_theory"]

    def paint(axes: Axes) -> None:
        places = _rows(axes, [f"{name}  ({each['p']:.2g})" for name, each in theories.items()] + ["all theories"])
        for place, each in zip(places, theories.values(), strict=False):
            axes.plot(each["says"], place, "o", color=ONE, alpha=_dark(each["p"]), ms=7)
        axes.plot([result["lower"], result["upper"]], [places[-1]] * 2, color=ALL, lw=2)
        axes.plot(result["p"], places[-1], "D", color=ALL, ms=7)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("probability of the event")

    return f"P({query['event']}) = {result['p']:.3g}", len(theories) + 1, paint


def _interval(result: Values, query: Values) -> Picture:
    theories = result["epistemic"]["by_theory"]

    def paint(axes: Axes) -> None:
        places = _rows(axes, [f"{name}  ({each['p']:.2g})" for name, each in theories.items()] + ["all theories"])
        for place, each in zip(places, theories.values(), strict=False):
            axes.plot([each["lower"], each["upper"]], [place] * 2, color=ONE, alpha=_dark(each["p"]), lw=2)
            axes.plot(each["median"], place, "o", color=ONE, alpha=_dark(each["p"]), ms=6)
        axes.plot([result["lower"], result["upper"]], [places[-1]] * 2, color=ALL, lw=2.5)
        axes.plot(result["median"], places[-1], "D", color=ALL, ms=7)
        axes.set_xlabel(f"median and {result['level']:.0%} interval\n(in brackets: how probable the theory is)")

    return f"{query['expression']} = {result['median']:.3g}", len(theories) + 1, paint


def _predict(result: Values, query: Values) -> Picture:
    theories = result["epistemic"]["by_theory"]
    at = _design(query["design"])

    def paint(axes: Axes) -> None:
        places = _rows(axes, [f"{name}  ({each['p']:.2g})" for name, each in theories.items()] + ["all theories"])
        for place, each in zip(places, theories.values(), strict=False):
            axes.plot(each["mean"], place, "o", color=ONE, alpha=_dark(each["p"]), ms=6)
        axes.plot([result["lower"], result["upper"]], [places[-1]] * 2, color=ALL, lw=2.5)
        axes.plot(result["median"], places[-1], "D", color=ALL, ms=7)
        axes.set_xlabel(f"mean of each theory;\nmedian and {result['level']:.0%} interval of the outcome")

    return f"Outcome at {at}", len(theories) + 1, paint


def _recommend(result: Values, query: Values) -> Picture:
    rows = result["ranked"][:SHOWN]

    def paint(axes: Axes) -> None:
        names = [" & ".join(map(_design, row.get("designs", [row.get("design")]))) for row in rows]
        for place, row in zip(_rows(axes, names), rows, strict=True):
            axes.barh(place, row["nats"], 0.55, color=ONE, alpha=1.0 if row["worth_running"] else 0.3)
            if row["upper"] > row["lower"]:
                axes.plot([row["lower"], row["upper"]], [place] * 2, color="#1d1f21", lw=1.2)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"expected information about {query['about']}, nats\n(pale: not worth running)")

    return f"Next run, best per cost first: {result['advice']}", len(rows), paint


def _guard(result: Values, query: Values) -> Picture:
    theories = result["by_theory"]

    def paint(axes: Axes) -> None:
        places = _rows(axes, [f"{name}  ({each['p']:.2g})" for name, each in theories.items()])
        for place, (name, each) in zip(places, theories.items(), strict=True):
            inside = name in result["cautious_set"]
            axes.plot([each["harm"], each["upper"]], [place] * 2, color=ONE, lw=2)
            axes.plot(each["upper"], place, "o", color=ONE, mfc=ONE if inside else "none", ms=7)
        axes.axvline(query["threshold"], color="#1d1f21", lw=1.2, ls="--")
        axes.annotate("threshold", (query["threshold"], 1), xycoords=("data", "axes fraction"), ha="left", va="top",
                      xytext=(3, 0), textcoords="offset points", fontsize=8)  # fmt: skip
        axes.axvline(result["cautious"], color=ALL, lw=2, alpha=0.7)
        axes.set_xlabel("P(harm) and its upper bound\n(filled: in the cautious set; orange: what decides)")

    return f"{result['decision']}: {query['harm']} at {_design(query['design'])}", len(theories), paint


def _why(result: Values, query: Values) -> Picture:
    rows = [row for row in result["rows"][:SHOWN] if row["moved"] is not None]

    def paint(axes: Axes) -> None:
        for place, row in zip(_rows(axes, [row["source"] for row in rows]), rows, strict=True):
            axes.barh(place, row["moved"], 0.55, color=ONE, alpha=1.0 if row["trusted"] else 0.3)
        axes.axvline(0, color="#1d1f21", lw=0.8)
        scale = "logit of the probability" if result["scale"] == "logit" else "median"
        axes.set_xlabel(f"how far the {scale} moves without the row")

    return f"What moves {query['of']} = {result['value']:.3g}", len(rows), paint


def _score(result: Values, _: Values) -> Picture:
    levels = {float(level): share for level, share in result["coverage"].items()}

    def paint(axes: Axes) -> None:
        places = _rows(axes, [f"{level:.0%} intervals" for level in levels])
        for place, (level, share) in zip(places, levels.items(), strict=True):
            axes.barh(place, share, 0.55, color=ONE)
            axes.plot([level] * 2, [place - 0.35, place + 0.35], color="#1d1f21", lw=1.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of held-out outcomes inside (mark: what was said)")

    return f"Held-out rows: log score {result['log_score']:.3g}, CRPS {result['crps']:.3g}", len(levels), paint


def _design(design: Values) -> str:
    return " ".join(f"{k}={v:g}" if isinstance(v, int | float) else f"{k}={v}" for k, v in design.items())


_PICTURES: dict[str, Callable[[Values, Values], Picture]] = {
    "prob": _prob, "interval": _interval, "theories": _theories, "predict": _predict, "recommend": _recommend,
    "guard": _guard, "why": _why, "score": _score,
}  # fmt: skip
