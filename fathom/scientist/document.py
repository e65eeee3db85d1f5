"""World files as plain data: YAML with the line of every value, evidence files read into rows, canonical JSON and its hash.

A *document* is a world file with its evidence files replaced by their rows and hashes: it stands alone. Its canonical JSON
(RFC 8785) is the snapshot, and the SHA-256 of that is the world's name in every answer.
"""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.scientist.expression import evaluate, parse

Path_ = tuple[str | int, ...]
_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
MAX_BYTES, MAX_ROWS, MAX_DEPTH = 20_000_000, 10_000, 30


def canonical(value: Any) -> bytes:
    """The one byte string of a JSON value (RFC 8785), in which a number is a double: whole numbers beyond 2^53 as well."""
    try:
        import rfc8785
    except ImportError:
        raise UserError("the scientist needs the extra `scientist`: pip install 'fathom-attnres[scientist]'") from None
    try:
        return rfc8785.dumps(value)
    except rfc8785.IntegerDomainError:
        return rfc8785.dumps(_doubles(value))


def _doubles(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _doubles(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_doubles(each) for each in value]
    if isinstance(value, int) and abs(value) >= 2**53:
        if abs(value) > 1e300:
            raise UserError(f"a number of {len(str(abs(value)))} digits is too large")
        return float(value)
    return value


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


class Issues:
    """What is wrong with a world, each with the path of the value it is about."""

    def __init__(self, name: str, lines: dict[Path_, int]) -> None:
        self.name, self.lines = name, lines
        self.found: list[tuple[int, str]] = []

    def add(self, path: Path_, message: str) -> None:
        while path and path not in self.lines:
            path = path[:-1]
        self.found.append((self.lines.get(path, 1), message))

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """A ``UserError`` inside becomes an issue about ``path``, and the rest goes on."""
        try:
            yield
        except UserError as error:
            self.add(path, str(error))

    def messages(self) -> list[str]:
        """``file:line: what``, in the file's order."""
        return [f"{self.name}:{line}: {message}" for line, message in sorted(dict.fromkeys(self.found))]

    def check(self) -> None:
        if self.found:
            more = f" (and {len(self.found) - 1} more: fathom world lint)" if len(self.found) > 1 else ""
            raise UserError(self.messages()[0] + more)


def read_yaml(text: str, name: str) -> tuple[Any, dict[Path_, int]]:
    """A YAML text as plain values, and the line of every value by its path.

    Raises:
        UserError: not YAML, or a feature that a world has no use for: tags, anchors, two equal keys.
    """
    try:
        import yaml
    except ImportError:
        raise UserError("the scientist needs the extra `scientist`: pip install 'fathom-attnres[scientist]'") from None
    lines: dict[Path_, int] = {}
    scalars = yaml.constructor.SafeConstructor()

    def plain(node: Any, path: Path_) -> Any:
        line = node.start_mark.line + 1
        lines[path] = line
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    raise UserError(f"{name}:{line}: a key must be a plain name")
                if key.value in result:
                    raise UserError(f"{name}:{key.start_mark.line + 1}: {key.value} stands there twice")
                result[key.value] = plain(value, (*path, key.value))
                lines[(*path, key.value)] = key.start_mark.line + 1
            return result
        if isinstance(node, yaml.SequenceNode):
            return [plain(value, (*path, index)) for index, value in enumerate(node.value)]
        kind = node.tag.rpartition(":")[2]
        if kind == "str" and node.style is None and _FLOAT.fullmatch(node.value):
            return float(node.value)  # YAML 1.1 takes 1e-3 for a text
        if kind not in ("str", "int", "float", "bool", "null"):
            raise UserError(f"{name}:{line}: a value of kind {kind} has no place in a world")
        return scalars.construct_object(node)

    loader, depth = None, 0
    try:
        for token in yaml.scan(text, yaml.SafeLoader):
            opens = isinstance(
                token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken | yaml.BlockMappingStartToken
            )
            closes = isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken | yaml.BlockEndToken)
            depth += opens + isinstance(token, yaml.BlockSequenceStartToken) - closes
            if depth > MAX_DEPTH:
                raise UserError(f"{name}:{token.start_mark.line + 1}: nested too deep")
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken | yaml.TagToken):
                raise UserError(
                    f"{name}:{token.start_mark.line + 1}: anchors, aliases and tags have no place in a world"
                )
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return (plain(node, ()) if node is not None else None), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error)
        raise UserError(f"{name}:{mark.line + 1 if mark else 1}: this is not YAML: {what}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _read_json(text: str, name: str) -> tuple[Any, dict[Path_, int]]:
    try:
        return json.loads(text), {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: this is not JSON: {error}") from None


def read_document(path: Path) -> tuple[dict[str, Any], Issues]:
    """A world file or snapshot as a document, its evidence files read; issues so far may be in the second value.

    Raises:
        UserError: the file cannot be read at all.
    """
    name = path.name
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: a world file may have {MAX_BYTES:,} bytes")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: this is not text") from None
    value, lines = _read_json(text, name) if path.suffix == ".json" else read_yaml(text, name)
    issues = Issues(name, lines)
    if not isinstance(value, dict):
        raise UserError(f"{name}:1: a world is a list of names with values, starting with `world:`")
    evidence = value.get("evidence")
    if isinstance(evidence, list):
        value["evidence"] = [_with_rows(item, path.parent, issues, index) for index, item in enumerate(evidence)]
    return value, issues


def _with_rows(item: Any, folder: Path, issues: Issues, index: int) -> Any:
    """An evidence item with ``data`` in place of ``file`` and ``rows``."""
    if not isinstance(item, dict) or "file" not in item:
        return item
    where = ("evidence", index, "file")
    result = {key: value for key, value in item.items() if key not in ("file", "rows")}
    with issues.at(*where):
        if "data" in item:
            raise UserError("give `file` or `data`, not both")
        content = _content(item["file"], folder)
        found = hashlib.sha256(content).hexdigest()
        if item.get("sha256", found) != found:
            raise UserError(f"{item['file']} is not the file that was meant: its SHA-256 is {found}")
        table = read_table(content, str(item["file"]))
        result |= {"sha256": found, "read_from": str(item["file"])}
        columns = item.get("rows")
        if columns is None:
            result["data"] = table
            return result
        if not isinstance(columns, dict):
            raise UserError("`rows` gives an expression over the file's columns for each design and the outcome")
        trees = {key: parse(str(text)) for key, text in columns.items()}
        keep = trees.pop("keep", None)
        rows = [row for row in table if keep is None or bool(evaluate(keep, row))]
        result["data"] = [{key: _scalar(evaluate(tree, row)) for key, tree in trees.items()} for row in rows]
    return result


def _scalar(value: Any) -> Any:
    return value if isinstance(value, str) else float(value)


def _content(file: Any, folder: Path) -> bytes:
    if not isinstance(file, str):
        raise UserError("`file` is the name of a .csv, .jsonl or .json file")
    if file.startswith("package:"):
        name = file.removeprefix("package:")
        resource = files("fathom") / "assets" / name
        if "/" in name or "\\" in name or not resource.is_file():
            raise UserError(f"the package has no file {name}")
        return resource.read_bytes()
    path = folder / file
    if not path.is_file():
        raise UserError(f"there is no file {file} beside the world file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{file} has more than {MAX_BYTES:,} bytes")
    return path.read_bytes()


def read_table(content: bytes, name: str) -> list[dict[str, Any]]:
    """The rows of a .csv, .jsonl or .json file, numbers as numbers.

    A .json file is a list of rows, or the lab's table of sizes and arms: ``{"sizes": [{..}], "losses": {arm: [..]}}``,
    which becomes a row for each size and arm with the columns ``arm`` and ``loss``.
    """
    try:
        text = content.decode("utf-8")
        if name.endswith(".csv"):
            reader = csv.DictReader(io.StringIO(text))
            rows: Any = [{key: _number(value) for key, value in row.items()} for row in reader]
        elif name.endswith(".jsonl"):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif name.endswith(".json"):
            rows = json.loads(text)
            if isinstance(rows, dict) and {"sizes", "losses"} <= rows.keys():
                rows = [{**size, "arm": arm, "loss": loss} for arm, losses in rows["losses"].items()
                        for size, loss in zip(rows["sizes"], losses, strict=True)]  # fmt: skip
        else:
            raise UserError(f"{name}: evidence is read from .csv, .jsonl and .json files")
    except (ValueError, TypeError, AttributeError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{name} cannot be read: {error}") from None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and all(isinstance(k, str) for k in row) for row in rows
    ):
        raise UserError(f"{name}: this is not a list of rows with named columns")
    if len(rows) > MAX_ROWS:
        raise UserError(f"{name} has {len(rows):,} rows: {MAX_ROWS:,} at most")
    return rows


def _number(text: Any) -> Any:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return text
    return value if math.isfinite(value) else text
