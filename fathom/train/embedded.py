"""The quick-start text that travels inside the package: 80 State of the Union addresses, 1790 to 2021.

`assets/sotu.txt.xz` holds one address a line: split, year, president and text between tabs. `tools/make_assets.py`
makes it and its 1,024-token tokenizer. The text is in the public domain (assets/sotu-NOTICE.txt).
"""

import hashlib
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from fathom import __version__
from fathom.errors import UserError
from fathom.train.data import FORMAT, SPLITS, TokenShards
from fathom.train.prepare import PrepareOptions, build
from fathom.train.text import Document

_ASSETS = Path(str(resources.files("fathom"))) / "assets"
_TEXT, _TOKENIZER = _ASSETS / "sotu.txt.xz", _ASSETS / "sotu-tokenizer.json"


def documents() -> Iterator[Document]:
    """The embedded addresses with their splits."""
    for line in lzma.decompress(_TEXT.read_bytes()).decode().splitlines():
        split, year, president, text = line.split("\t")
        yield Document(text, f"{president}, {year}", split)


def embedded(cache: Path | None = None) -> Path:
    """The folder of the quick-start dataset; made in about two seconds the first time, checked and reused later.

    Args:
        cache: parent folder; `$XDG_CACHE_HOME/fathom` or `~/.cache/fathom` by default, and a temporary one if that is
            not writable.
    """
    # The code that makes it counts too: another version may cut shards elsewhere or write another manifest.
    made_by = f"{FORMAT} {__version__}".encode()
    identity = hashlib.sha256(_TEXT.read_bytes() + _TOKENIZER.read_bytes() + made_by).hexdigest()
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fathom"
    folder = Path(cache) / f"sotu-{identity[:12]}"
    if _intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".sotu-", dir=folder.parent)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"fathom-{os.getuid()}" / folder.name
        if _intact(folder):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".sotu-", dir=folder.parent)
    try:
        made = Path(work) / folder.name
        options = PrepareOptions(tokenizer=_TOKENIZER, workers=1)
        source = {"kind": "embedded", "text": "State of the Union addresses", "identity": identity}
        build(documents(), made, options, name="sotu", source=source)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        try:
            made.rename(folder)
        except OSError:
            if not _intact(folder):  # else another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _intact(folder: Path) -> bool:
    try:
        for split in SPLITS:
            TokenShards(folder, split)
    except UserError:
        return False
    return True
