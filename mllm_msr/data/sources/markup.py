"""What a reader sees of a text with HTML in it: no tags, entities resolved."""

import re

import duckdb
import pyarrow as arrow
from duckdb import func
from lxml import etree

# A browser starts a new line there; other tags stand inside words, as in H<sub>2</sub>O.
LINE = re.compile(
    "<(?=/?(?:address|article|aside|blockquote|br|center|d[dlt]|div|figure|footer|form|h[1-6r]|header"
    "|li|main|nav|ol|option|p|pre|section|table|t[dhr]|ul)[ />])",
    re.IGNORECASE,
)
UNSEEN = ("iframe", "noscript", "object", "script", "style", "svg", "template", "title")
OPEN_TAG = re.compile("<(?=[^<>]*$)")  # mostly a comparison; a parser drops what follows it


def add_visible_text(connection: duckdb.DuckDBPyConnection) -> None:
    """Give a connection's SQL the function ``visible_text(text, length)``."""

    def visible_texts(texts: arrow.ChunkedArray, lengths: arrow.ChunkedArray) -> arrow.Array:
        pairs = zip(texts.to_pylist(), lengths.to_pylist(), strict=True)
        return arrow.array([shorten(see(text), length) for text, length in pairs], arrow.string())

    connection.create_function(
        "visible_text", visible_texts, ["VARCHAR", "BIGINT"], "VARCHAR", type=func.ARROW
    )


def see(text: str) -> str:
    """Take tags, comments and scripts out of a text, resolve entities and fold whitespace."""
    if "<" in text or "&" in text:
        text = _parse(LINE.sub(" <", OPEN_TAG.sub("&lt;", text)))
    return " ".join(text.split())


def shorten(text: str, length: int) -> str:
    """Cut a text to at most ``length`` characters, between words where there is a gap."""
    if len(text) <= length:
        return text
    return text[: length + 1].rpartition(" ")[0] or text[:length]


def _parse(text: str) -> str:
    """Join what libxml2, which mends any HTML, holds for text."""
    parser = etree.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True
    )
    whole = f"<html><body>{text}".replace("\0", "")
    tree = etree.fromstring(whole.encode(), parser)
    etree.strip_elements(tree, *UNSEEN, with_tail=False)
    return "".join(tree.itertext())
