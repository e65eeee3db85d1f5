"""The corpus debian-docs on small packages built here, through the real dpkg-deb, with an apt of ours on the PATH."""

import gzip
import hashlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fathom.errors import UserError
from fathom.train.data import Manifest, TokenShards
from fathom.train.debian_docs import extract, is_prose, keep, known_packages, without_symbol_lists
from fathom.train.markup import html_text, info_text, man_text, plain_text
from fathom.train.prepare import PrepareOptions, prepare, sample_documents

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def prose(topic: str, sentences: int = 8) -> str:
    return "\n\n".join(
        f"The {topic} number {i} is one of those that you should not leave to the others, for it may be used by all."
        for i in range(sentences)
    )


# Formats to text


def test_html_keeps_prose_code_and_tables_and_drops_navigation():
    page = b"""<html><head><title>T</title><style>p {}</style></head><body>
    <div class="sphinxsidebar">Sidebar</div><nav>Navigation</nav>
    <div role="main"><div class="toc"><p>A table of contents</p></div><h1>Heading<a class="headerlink" href="#h">\xc2\xb6</a></h1>
    <p>One <b>bold</b>
       word &amp; more.<p>Two.
    <pre>def f():
    <span>return</span>  1

x = 2</pre>
    <ul><li>first<li>second</li></ul>
    <table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>
    <script>var x;</script></div><footer>Footer</footer></body></html>"""
    assert html_text(page) == (
        "Heading\n\nOne bold word & more.\n\nTwo.\n\ndef f():\n    return  1\n\nx = 2\n\nfirst\nsecond\n\na b\n\nc"
    )


def test_doxygen_lines_and_buttons():
    page = b"""<body><div class="contents"><div>Edit this page</div><p>See.</p>
    <div class="fragment"><div class="line">int a;</div><div class="line">  int b;</div></div>
    <p>Definition at line 5 of file a.h.</p></div></body>"""
    assert html_text(page) == "See.\n\nint a;\n  int b;"


@pytest.mark.parametrize("page", [b"", b"\x00\x0c<", b"<table><p>", b"<" * 5000, b"<div>" * 5000, bytes(range(256))])
def test_no_page_breaks_the_parser(page: bytes):
    assert isinstance(html_text(page), str)


def test_manual_pages_lose_their_roff():
    page = r""".\" a comment
.TH LS 1 "2026"
.SH NAME
ls \- list \fIdirectory\fR contents
.SH "SEE ALSO"
A word
joined by
.BR dir (1),
\(lqquoted\(rq.
.PP
Next.
.nf
  int x;

  int y;
.fi
.TS
l l.
table	gone
.TE
.IP \(bu 2
An item.
"""
    assert man_text(page) == (
        'NAME\n\nls - list directory contents\n\nSEE ALSO\n\nA word joined by dir(1), "quoted".\n\nNext.\n\n'
        "  int x;\n\n  int y;\n\n• An item."
    )


def test_info_files_lose_nodes_and_menus():
    text = (
        "This is x.info\n\x1f\nFile: x.info,  Node: Top,  Next: One\n\nText of the top.\n\n* Menu:\n\n"
        "* One::    The first.\n* Two::    The second, which\n             goes on.\n\n"
        "\x1f\nFile: x.info,  Node: One\n\nSee *note Two::, please.\n\x1f\nTag Table:\nNode: Top\x7f80\n"
    )
    assert info_text(text) == "Text of the top.\n\nSee Two, please."


def test_terminal_tricks_go():
    assert plain_text("N\x08NA\x08A \x0c_\x08x  \r\n\n\n\nend\x07") == "NA x\n\nend"


# What is kept


def test_prose_is_english_sentences():
    assert is_prose(prose("house"))
    assert not is_prose(prose("house", 2))  # too short
    assert not is_prose("uint8_t x[16]; /* 0x7fff */ return y << 3; " * 20)  # not letters
    assert not is_prose("Das ist ein Haus und wir haben es gesehen, denn es war dort oben. " * 10)
    assert not is_prose("alpha beta gamma delta epsilon zeta " * 20)  # no function words


def test_symbol_lists_go_and_short_headings_stay():
    symbols = "\n\n".join(f"static int member_{i}" for i in range(6))
    assert without_symbol_lists(f"Intro.\n\n{symbols}\n\nThe end.") == "Intro.\n\nThe end."
    assert without_symbol_lists(f"Intro.\n\n{symbols}") == "Intro."
    few = "Returns\n\nint\n\nThis is the value of it."
    assert without_symbol_lists(few) == few


def test_near_duplicates_and_long_files():
    seen: set[bytes] = set()
    first = prose("first", 20)
    assert list(keep(first, seen)) == [first]
    assert list(keep(first + "\n\n" + prose("tail", 10), seen)) == []  # most of it was seen
    assert list(keep(prose("new", 20) + "\n\n" + prose("first", 4), seen)) == [prose("new", 20)]
    pieces = list(keep(prose("long", 2000), seen))
    assert len(pieces) > 2 and "\n\n".join(pieces) == prose("long", 2000)
    assert all(len(piece) < 66_000 for piece in pieces)


# Packages


def build_deb(folder: Path, name: str, files: dict[str, bytes | str]) -> Path:
    """A package of these files; a text is the target of a symbolic link."""
    root = folder / f"{name}-root"
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, str):
            (root / path).symlink_to(data)
        else:
            (root / path).write_bytes(data)
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1.0-1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: x\n"
    )
    deb = folder / f"{name}_1.0-1_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "-b", str(root), str(deb)], check=True, capture_output=True
    )
    shutil.rmtree(root)
    return deb


def page(topic: str) -> bytes:
    return "<body>{}</body>".format("".join(f"<p>{part}</p>" for part in prose(topic).split("\n\n"))).encode()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two packages in a folder that plays the Debian archive."""
    folder = tmp_path / "archive"
    folder.mkdir()
    alpha = {f"usr/share/doc/alpha/{i}.html": page(f"alpha page {i}") for i in range(30)}
    alpha |= {
        "usr/share/doc/alpha/copyright": prose("licence").encode(),
        "usr/share/doc/alpha/0.txt": prose("alpha page 0, as text").encode(),  # its page is read
        "usr/share/info/alpha.info.gz": gzip.compress(b"\x1f\n" + prose("info").encode()),  # there are pages
        "usr/share/doc/alpha/genindex.html": page("index"),
        "usr/share/doc/alpha/picture.png": b"\x89PNG",
    }
    beta = {f"usr/share/man/man3/beta{i}.3x.gz": gzip.compress(prose(f"beta call {i}").encode()) for i in range(30)}
    beta["usr/share/info/beta.info.gz"] = gzip.compress(b"\x1f\n" + prose("beta info").encode())
    beta["usr/share/doc/beta/copy.html"] = page("alpha page 3")  # a duplicate from another package
    build_deb(folder, "alpha", alpha)
    build_deb(folder, "beta", beta)
    return folder


@needs_dpkg
def test_extract_reads_what_is_prose(archive: Path):
    licence, texts = extract(archive / "alpha_1.0-1_all.deb")
    assert licence == "usr/share/doc/alpha/copyright"
    assert [name for name, _ in texts] == sorted(f"usr/share/doc/alpha/{i}.html" for i in range(30))
    assert dict(texts)["usr/share/doc/alpha/7.html"] == prose("alpha page 7")
    licence, texts = extract(archive / "beta_1.0-1_all.deb")
    assert licence is None and len(texts) == 32
    assert dict(texts)["usr/share/info/beta.info.gz"] == prose("beta info")


@needs_dpkg
def test_a_shared_licence_is_found_and_links_are_not_read(tmp_path: Path):
    files = {"usr/share/doc/gamma": "gamma-data", "usr/share/help/a.html": page("a"), "usr/share/help/b.html": "a.html"}
    licence, texts = extract(build_deb(tmp_path, "gamma", files))
    assert licence == "usr/share/doc/gamma-data/copyright"
    assert [name for name, _ in texts] == ["usr/share/help/a.html"]


@needs_dpkg
def test_a_damaged_package_is_named(archive: Path):
    deb = archive / "alpha_1.0-1_all.deb"
    deb.write_bytes(deb.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"alpha_1\.0-1_all\.deb cannot be unpacked"):
        extract(deb)


@pytest.fixture
def apt(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """apt-get and apt-cache that serve the archive; returns a list of its packages and one that it lacks."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    stanzas = tmp_path / "stanzas"
    stanzas.write_text(
        "\n".join(
            f"Package: {deb.name.split('_')[0]}\nVersion: 1.0-1\nSHA256: {hashlib.sha256(deb.read_bytes()).hexdigest()}\n"
            for deb in sorted(archive.iterdir())
        )
    )
    (bin_folder / "apt-cache").write_text(f"#!/bin/sh\ncat {stanzas}\n")
    (bin_folder / "apt-get").write_text(
        f"#!/bin/sh\necho download >> {tmp_path}/calls\nshift 2\n"
        f'for p in "$@"; do cp {archive}/"${{p%%=*}}"_* . || exit 100; done\n'
    )
    for tool in bin_folder.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    listing = tmp_path / "packages.txt"
    listing.write_text("beta\nalpha\ngone\n")
    return listing


OPTIONS = PrepareOptions(vocab_size=400, val_fraction=0.2)


def with_cache(listing: Path, cache: Path | None, workers: int = 2) -> PrepareOptions:
    return replace(OPTIONS, packages=listing, cache=cache, workers=workers)


@needs_dpkg
def test_the_corpus_from_download_to_manifest(apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    out, cache = tmp_path / "out", tmp_path / "cache"
    manifest = prepare("debian-docs", out, options=with_cache(apt, cache))
    assert manifest.name == "debian-docs" and manifest.source["missing"] == ["gone"]
    beta, alpha = manifest.source["packages"]  # in the order of the list
    assert (beta["package"], beta["version"], beta["licence"], beta["documents"]) == ("beta", "1.0-1", None, 32)
    assert alpha["licence"] == "usr/share/doc/alpha/copyright"
    assert alpha["documents"] == 29  # page 3 was in beta
    assert alpha["sha256"] == hashlib.sha256((cache / "alpha_1.0-1_all.deb").read_bytes()).hexdigest()
    total = manifest.total("train", "documents") + manifest.total("val", "documents")
    assert total == alpha["documents"] + beta["documents"]
    assert sum(row["bytes"] for row in (alpha, beta)) == manifest.total("train", "bytes") + manifest.total(
        "val", "bytes"
    )
    assert Manifest.load(out) == manifest and TokenShards(out, "val").num_tokens > 0
    assert all("should not leave to the others" in text for text in sample_documents(out, 5, 0))
    assert (tmp_path / "calls").read_text() == "download\n"
    again = prepare("debian-docs", tmp_path / "again", options=with_cache(apt, cache, workers=1))
    assert again == manifest
    assert (tmp_path / "calls").read_text() == "download\n", "the cache was not used"
    assert prepare("debian-docs", out, options=with_cache(apt, cache)) == manifest


@needs_dpkg
def test_what_is_wrong_with_apt_is_said(apt: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    options = with_cache(apt, None)
    altered = archive / "beta_1.0-1_all.deb"
    good = altered.read_bytes()
    altered.write_bytes(good + b"\n")
    with pytest.raises(UserError, match="beta is not the file that apt promised"):
        prepare("debian-docs", tmp_path / "out", options=options)
    altered.unlink()
    with pytest.raises(UserError, match=r"apt-get download failed: .*apt-get update"):
        prepare("debian-docs", tmp_path / "out", options=options)
    (tmp_path / "stanzas").write_text("")
    with pytest.raises(UserError, match=r"none of the packages .* run `apt-get update`"):
        prepare("debian-docs", tmp_path / "out", options=options)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="debian-docs needs apt-get"):
        prepare("debian-docs", tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_known_packages_keep_the_order_of_the_list(apt: Path):
    assert [package.package for package in known_packages(["beta", "nothing", "alpha"])] == ["beta", "alpha"]
