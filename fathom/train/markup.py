"""Documentation formats to plain text: HTML, manual pages (roff), info, and text with its terminal tricks.

Paragraphs come out separated by a blank line, list items and table rows by a line end (a blank line where their tags
are closed), and preformatted text keeps its lines. Each function takes one file's text and gives text; what is
navigation, not prose, goes.
"""

import re

from fathom.train.text import missing_extra

_DROPPED_TAGS = ["script", "style", "nav", "footer", "noscript", "svg", "button", "select", "template", "iframe"]
_DROPPED = (
    "[role=navigation], [role=search], .sphinxsidebar, .related, .headerlink, .navheader, .navfooter, "
    ".nav, .navbar, .toc, .topic.contents, .toctree-wrapper, .sidebar, .breadcrumb, .breadcrumbs, "
    ".linenos, .lineno, .navpath, .ttc, .qindex, .navigation_header, .searchbox, .copyright, .index, "
    ".viewcode-link, .viewcode-back, .bottomNav, .topNav, .subNav, .src, .srclink, .anchor, .out-of-band, "
    ".toc-title, .indextable, .genindextable, .prev-next-area, .headings, .button-holder, .dyncontent, "
    ".header-link, .notable-traits"
)
_MAIN = ("main", "[role=main]", "div.body", "#main-content", "#content", "article", "body")
# A form feed is white space to an HTML parser, so it stays where it is put, even in a table. Two end a paragraph.
_PARAGRAPH = re.compile(
    rb"<(?=/?(?:p|h[1-6]|pre|table|[uod]l|blockquote|section|div|hr|title|page|note|steps|list)\b)", re.IGNORECASE
)
_LINE = re.compile(rb"<(?=(?:/?(?:li|tr|dt|dd|item)|br)\b)", re.IGNORECASE)
_CELL = re.compile(rb"<(?=t[dh]\b)", re.IGNORECASE)
_PRE_SPACE, _PRE_LINE = "\x1e", "\x1f"


_BUTTONS = re.compile(
    r"^(?:Edit on Git\w+|On this page|Edit this page|Show Source|Run|Expand description|Copy|\[?source\]?|Next|Previous"
    r"|Prev|Up|Home|Top|Contents|Index|Table of Contents|Back to top|Help|Search|Skip to content|See also"
    r"|Definition at line \d+ of file .*|Definition in file .*|Source position: .*)\n\n+",
    re.MULTILINE,
)


def html_text(data: bytes) -> str:
    """The main content of an HTML (or Mallard) page."""
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError:
        raise missing_extra("selectolax") from None
    data = data.translate(None, b"\x00\x0b\x0c\x1e\x1f")
    data = _CELL.sub(b" <", _LINE.sub(b"\x0c<", _PARAGRAPH.sub(b"\x0c\x0c<", data)))
    tree = LexborHTMLParser(data)
    tree.strip_tags(_DROPPED_TAGS)
    for node in tree.css(_DROPPED):
        node.decompose()
    for node in tree.css("pre, div.fragment"):  # a fragment is Doxygen's: a div a line
        kept = re.sub(r"\x0c+", "" if node.tag == "pre" else "\n", node.text()).strip("\n")
        kept = kept.replace("\n", _PRE_LINE).replace(" ", _PRE_SPACE)
        node.replace_with(f"\x0c\x0c{kept}\x0c\x0c")
    roots = (tree.css_first(selector) for selector in _MAIN)
    text = next((root.text() for root in roots if root is not None), "")
    text = text.replace("\xa0", " ").replace("¶", "")
    text = re.sub(r"[ \t\r\n]+", " ", text)
    text = re.sub(r" ?\x0c[\x0c ]*", lambda gap: "\n\n" if gap[0].count("\x0c") > 1 else "\n", text)
    text = _BUTTONS.sub("", text + "\n\n")
    return tidy(text.replace(_PRE_SPACE, " ").replace(_PRE_LINE, "\n"))


_INFO_NODE = re.compile(r"^File: .*Node: .*$", re.MULTILINE)
_INFO_MENU = re.compile(r"^\* (?:Menu:|[^\n]*::).*(?:\n[ \t]{8,}\S.*)*$", re.MULTILINE)


def info_text(text: str) -> str:
    """An info file: nodes without headers, menus, index entries and the tag table."""
    text = text.split("\x1f\nTag Table:")[0]
    text = text[text.find("\x1f") + 1 :]
    text = re.sub(r"^\* .*\(line +\d+\)$", "", _INFO_MENU.sub("", _INFO_NODE.sub("", text)), flags=re.MULTILINE)
    text = re.sub(r"\*note ([^:]*)::", r"\1", text)
    return tidy(text.replace("\x1f", "\n").replace("‘", "'").replace("’", "'"))


_ROFF_CHARACTERS = {
    "aq": "'", "dq": '"', "lq": '"', "rq": '"', "oq": "'", "cq": "'", "em": "—", "en": "–", "hy": "-", "bu": "•",
    "ti": "~", "ha": "^", "rs": "\\", "ga": "`", "co": "(c)", "rg": "(R)", "tm": "(TM)", "->": "->", "<-": "<-",
    "<=": "<=", ">=": ">=", "mu": "x", "pl": "+", "mi": "-", "ba": "|", "bv": "|", "ul": "_", "fm": "'", "eq": "=",
}  # fmt: skip
_ROFF_FONT = re.compile(
    r"\\f(?:\(..|\[[^\]]*\]|.)|\\s[-+]?(?:\d|\(..|\[[^\]]*\])|\\[&|^/,:%c)]|\\\*(?:\(..|\[[^\]]*\]|.)"
)
_ROFF_NAMED = re.compile(r"\\\((..)|\\\[([^\]]+)\]")


def man_text(text: str) -> str:
    """A manual page in the man or mdoc macros: headings and filled paragraphs, tables left out."""
    out: list[str] = []
    filled, skipping = True, ""
    for line in text.splitlines():
        if skipping:
            skipping = "" if line.startswith(skipping) else skipping
            continue
        if not line.startswith((".", "'")):
            out.append(_roff_inline(line))
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        words = _roff_words(rest)
        match macro:
            case "ig" | "de" | "de1":
                skipping = f".{words[1]}" if macro != "ig" and len(words) > 1 else ".."
            case "TS" | "EQ" | "PS":
                skipping = {"TS": ".TE", "EQ": ".EN", "PS": ".PE"}[macro]
            case "SH" | "SS" | "Sh" | "Ss":
                out += ["", "", " ".join(words), ""]
            case "PP" | "LP" | "P" | "Pp" | "sp" | "HP" | "TP" | "TQ" | "It" | "Bl" | "El":
                out += ["", " ".join(words)] if macro == "It" else [""]
            case "IP":
                out += ["", words[0] if words else ""]
            case "B" | "I" | "SM" | "SB" | "Nm" | "Fl" | "Ar" | "Xr" | "Pa" | "Em" | "Nd" | "Cm" | "Va" | "Fn":
                out.append(" ".join(words))
            case "BR" | "RB" | "IR" | "RI" | "BI" | "IB":
                out.append("".join(words))
            case "nf" | "EX" | "Bd" | "Vb" | "CS":
                filled = False
                out += ["", "\x00"]
            case "fi" | "EE" | "Ed" | "Ve" | "CE":
                filled = True
                out += ["\x01", ""]
            case "br" if filled:
                out.append("\x02")
    return tidy(_fill(out))


def _fill(lines: list[str]) -> str:
    """Join lines into paragraphs outside of no-fill regions, which stand between \\x00 and \\x01."""
    parts: list[str] = []
    joined, filled = False, True
    for line in lines:
        if line in ("\x00", "\x01", "\x02"):
            filled, joined = line != "\x00" if line != "\x02" else filled, False
        elif not filled:
            parts.append("\n" + line)
        elif not line.strip():
            parts.append("\n\n")
            joined = False
        else:
            parts.append((" " if joined else "\n") + line.strip())
            joined = True
    return "".join(parts)


def _roff_words(rest: str) -> list[str]:
    return [_roff_inline(quoted or word) for quoted, word in re.findall(r'"((?:[^"]|"")*)"?|(\S+)', rest)]


def _roff_inline(line: str) -> str:
    line = re.sub(r'(?:^|(?<=.))\\["#].*', "", line)
    line = _ROFF_FONT.sub("", line)
    line = _ROFF_NAMED.sub(lambda name: _ROFF_CHARACTERS.get(name[1] or name[2], ""), line)
    line = re.sub(r"\\[hvwNldD]'[^']*'", "", line)
    return line.replace("\\-", "-").replace("\\ ", " ").replace("\\~", " ").replace("\\'", "'").replace("\\e", "\\")


def plain_text(text: str) -> str:
    """Text without overstriking ("_\\bx"), form feeds and control characters."""
    return tidy(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "", re.sub(r".\x08", "", text)))


def tidy(text: str) -> str:
    """No blanks at line ends, at most one blank line, LF line ends."""
    text = re.sub(r"[ \t\r]+$", "", text.replace("\r\n", "\n"), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")
