"""The corpus debian-docs: the documentation that Debian packages, as plain English text.

    fathom data prepare debian-docs OUT

    download   `apt-get download` of the packages in assets/debian-docs-packages.txt (about 1.2 GB; no root, no
               install), each compared with the sha256 that apt knows
    extract    HTML, info, manual pages and text (`fathom.train.markup`), streamed out of each .deb by `dpkg-deb`;
               indexes, source listings, change logs, licences, and what is there as HTML too are not read
    keep       paragraphs not seen before in any package; then documents of at least 300 characters, of which 62 % are
               letters, with 12 % English function words, and of which at least half was not seen before

The packages are free software and free documentation under many licences. What travels is this recipe and the manifest
(package, version, sha256, path of its licence); the text itself is never distributed. Versions drift with the Debian
release, so every result names its corpus hash.
"""

import bz2
import gzip
import hashlib
import logging
import posixpath
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.train.data import file_sha256
from fathom.train.markup import html_text, info_text, man_text, plain_text
from fathom.train.prepare import PrepareOptions
from fathom.train.spool import drop_seen_paragraphs
from fathom.train.text import Document
from fathom.train.workers import cores, in_order, processes

_log = logging.getLogger(__name__)
MIN_CHARS, MIN_LETTERS, MIN_STOP_WORDS, MIN_NEW = 300, 0.62, 0.12, 0.5
MAX_FILE, MAX_DOCUMENT, MAX_TWIN = 32 << 20, 64 << 10, 1 << 20
_WORD = re.compile(r"[a-z]+")
_STOP_WORDS = frozenset(
    _WORD.findall(
        "a all an and are as at be been but by can do for from has have if in is it may more no not of on one "
        "or other should so such than that the their then there these they this to use used was we when which "
        "will with you your"
    )
)
# Indexes, source listings, copies of the same text for other tools, and what repeats in every package.
_UNREAD = re.compile(
    r"/(_sources|_modules|_static|_images|_downloads|src|source|locale|examples?)/|/usr/(bin|lib|share/(man/[^m]|info/dir))"
    r"|genindex|modindex|_source\.html|[-_]members\.html|/(search|index-all|all-documents|nameindex|allclasses|contents)\b"
    r"|/(package-(tree|use|summary)|doc-index|index-\d)|/(copyright|changelog|news|authors|thanks|copying|licen[cs]e|gpl)"
    r"|requirements.*\.txt|cmakelists|sources?\.txt|\bgpl|objects\.inv|robots\.txt",
    re.IGNORECASE,
)
_MAN = re.compile(r"/man/man\d/[^/]+\.\d\w*$")


@dataclass
class Package:
    """One Debian package, and what the corpus took from it."""

    package: str
    version: str
    sha256: str
    """Of the .deb file."""
    licence: str | None = None
    """Path of its copyright file inside the .deb, or inside the package whose documentation folder it shares."""
    documents: int = 0
    bytes: int = 0


@dataclass
class DebianDocs:
    """The downloaded packages, and their section of the manifest, which grows while they are read."""

    folder: Path
    packages: list[Package]
    workers: int
    source: dict[str, Any]

    @classmethod
    @contextmanager
    def download(cls, options: PrepareOptions) -> Iterator["DebianDocs"]:
        """Fetch what `options.cache` lacks; without a cache, into a temporary folder that goes in the end.

        Raises:
            UserError: apt or dpkg is not there, the package lists are empty, or a download failed.
        """
        for command in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(command) is None:
                raise UserError(
                    f"debian-docs needs {command}: run it on Debian, or `fathom data unpack` a packed dataset"
                )
        listing = options.packages or Path(str(resources.files("fathom"))) / "assets" / "debian-docs-packages.txt"
        names = [line.strip() for line in listing.read_text("utf-8").splitlines() if line.strip()]
        packages = known_packages(names)
        missing = sorted(set(names) - {package.package for package in packages})
        if not packages:
            raise UserError("apt knows none of the packages of debian-docs: run `apt-get update` (as root) first")
        with tempfile.TemporaryDirectory(prefix="debian-docs-") as temporary:
            folder = Path(options.cache or temporary)
            folder.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            absent = [package for package in packages if find_deb(folder, package) is None]
            if absent:
                wanted = [f"{package.package}={package.version}" for package in absent]
                done = subprocess.run(
                    ["apt-get", "download", "-q", *wanted], cwd=folder, capture_output=True, text=True
                )
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                    raise UserError(f"apt-get download failed: {reason}; run `apt-get update` (as root) and try again")
            for package in absent:
                if find_deb(folder, package) is None:
                    raise UserError(f"{folder}: the download of {package.package} is not the file that apt promised")
            seconds = time.monotonic() - started
            _log.info("download: %d of %d packages, %.1f s", len(absent), len(packages), seconds)
            known = "".join(f"{package.package} {package.version} {package.sha256}\n" for package in packages)
            identity = hashlib.sha256(known.encode()).hexdigest()
            source = {"kind": "debian-docs", "identity": identity, "missing": missing, "packages": []}
            yield cls(folder, packages, options.workers or cores(), source)

    def documents(self) -> Iterator[Document]:
        """The kept documents, package after package."""
        seen: set[bytes] = set()
        with processes(self.workers) as pool:
            debs = [deb for package in self.packages if (deb := find_deb(self.folder, package)) is not None]
            extracted = in_order(lambda deb: pool.submit(extract, deb), debs, 2 * self.workers)
            for package, (licence, files) in zip(self.packages, extracted, strict=True):
                package.licence = licence
                for name, text in files:
                    for document in keep(text, seen):
                        package.documents += 1
                        package.bytes += len(document.encode())
                        yield Document(document, f"{package.package}: {name}")
                self.source["packages"].append(asdict(package))


def known_packages(names: list[str]) -> list[Package]:
    """What apt would download for each name, in the order of `names`; unknown names are left out."""
    shown = subprocess.run(["apt-cache", "show", "--no-all-versions", *names], capture_output=True, text=True).stdout
    found = {}
    for stanza in shown.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|SHA256): (.*)$", stanza, re.MULTILINE))
        if len(fields) == 3:
            found[fields["Package"]] = Package(fields["Package"], fields["Version"], fields["SHA256"])
    return [found[name] for name in names if name in found]


def find_deb(folder: Path, package: Package) -> Path | None:
    """The package's file in `folder`, if it is the right one."""
    return next((deb for deb in folder.glob(f"{package.package}_*.deb") if file_sha256(deb) == package.sha256), None)


def extract(deb: Path) -> tuple[str | None, list[tuple[str, str]]]:
    """The path of the licence in one .deb, and the name and text of each of its files that may be prose, by name."""
    licence: str | None = None
    texts: dict[str, str] = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as unpacking:
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    if name.endswith("/copyright") and licence is None:
                        licence = name
                    elif (
                        name == f"usr/share/doc/{deb.name.split('_')[0]}" and member.issym()
                    ):  # shares a package's papers
                        licence = posixpath.normpath(f"usr/share/doc/{member.linkname}/copyright")
                    readable = member.isfile() and member.size <= MAX_FILE and not _UNREAD.search(f"/{name}")
                    if readable and (to_text := reader(name)) is not None:
                        file = tar.extractfile(member)
                        text = without_symbol_lists(to_text(_unpacked(file.read(), name) if file else b""))
                        if is_prose(text):
                            texts[name] = text
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise UserError(f"{deb} cannot be unpacked: {error}") from None
    if unpacking.returncode:
        raise UserError(f"{deb} cannot be unpacked: dpkg-deb ended with {unpacking.returncode}")
    # A manual is often there as HTML pages, as text and as info: where there are pages, the others are not read.
    pages = {Path(name).stem.lower() for name in texts if reader(name) is html_text}
    for name in list(texts):
        bare = re.sub(r"\.(gz|bz2)$", "", name)
        twin = Path(bare).stem.lower() in pages or len(texts[name]) > MAX_TWIN
        if len(pages) > 3 and ("/info/" in name or (twin and bare.endswith((".txt", ".md")))):
            del texts[name]
    return licence, sorted(texts.items())


def reader(name: str) -> Callable[[bytes], str] | None:
    """What turns the file of this path into text, judged by the path alone; None for a kind that is not read."""
    name = re.sub(r"\.(gz|bz2)$", "", name)
    suffix = Path(name).suffix.lower()
    if suffix in (".html", ".htm", ".xhtml") or (suffix == ".page" and "/C/" in name):
        return html_text
    if _MAN.search(f"/{name}"):
        return lambda data: man_text(data.decode("utf-8", "replace"))
    if "/info/" in name:
        return lambda data: info_text(data.decode("utf-8", "replace"))
    if "/games/fortunes/" in name:
        return lambda data: plain_text(data.decode("utf-8", "replace").replace("\n%\n", "\n\n"))
    if suffix == ".dz":  # dictionaries name the source of a sense on a line of its own
        return lambda data: plain_text(re.sub(r"\n *\[[^]\n]{2,40}\](?=\n)", "", data.decode("utf-8", "replace")))
    if suffix in (".txt", ".md"):
        return lambda data: plain_text(data.decode("utf-8", "replace"))
    return None


def _unpacked(data: bytes, name: str) -> bytes:
    if name.endswith(".bz2"):
        return bz2.decompress(data)
    return gzip.decompress(data) if name.endswith((".gz", ".dz")) else data


def without_symbol_lists(text: str, longest: int = 5) -> str:
    """`text` without runs of more than `longest` one-line paragraphs that are no sentences: indexes, member lists, menus."""
    kept: list[str] = []
    bare = 0
    for paragraph in text.split("\n\n"):
        kept.append(paragraph)
        short = len(paragraph) < 160 and "\n" not in paragraph and not paragraph.endswith((".", "?", "!"))
        if short and sum(word in _STOP_WORDS for word in _WORD.findall(paragraph.lower())) < 2:
            bare += 1
            continue
        if bare > longest:
            del kept[-1 - bare : -1]
        bare = 0
    if bare > longest:
        del kept[-bare:]
    return "\n\n".join(kept)


def keep(text: str, seen: set[bytes]) -> Iterator[str]:
    """The documents of one file after deduplication: none if most was seen, several if it is long."""
    fresh = drop_seen_paragraphs(text, seen, at_least=40)
    if len(fresh) < MIN_NEW * len(text):
        return
    piece: list[str] = []
    size = 0
    for paragraph in fresh.split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= MAX_DOCUMENT:
            if is_prose(document := "\n\n".join(piece)):
                yield document
            piece, size = [], 0
    if is_prose(document := "\n\n".join(piece)):
        yield document


_NOT_LETTERS = bytes(byte for byte in range(256) if not chr(byte).isascii() or not chr(byte).isalpha())


def is_prose(text: str) -> bool:
    """Long enough, mostly letters, and with the function words that English sentences have."""
    text = " ".join(text.split())
    if len(text) < MIN_CHARS or len(text.encode().translate(None, _NOT_LETTERS)) < MIN_LETTERS * len(text):
        return False
    words = _WORD.findall(text.lower())
    return sum(word in _STOP_WORDS for word in words) >= MIN_STOP_WORDS * len(words)
