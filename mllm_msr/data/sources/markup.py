"""The visible text of HTML: tags and scripts removed, entities resolved."""

import re

import duckdb
import pyarrow as arrow
from duckdb import func
from lxml import etree

# Tags at which a browser starts a new line; others can stand inside a word, as in H<sub>2</sub>O.
BLOCK_TAG = re.compile(
    "<(?=/?(?:address|article|aside|blockquote|br|center|d[dlt]|div|figure|footer|form|h[1-6r]|header"
    "|li|main|nav|ol|option|p|pre|section|table|t[dhr]|ul)[ />])",
    re.IGNORECASE,
)
# The parser would drop what follows the end of a document.
DOCUMENT_TAG = re.compile(r"</?(?:html|body)(?=[\s/>])[^<>]*>", re.IGNORECASE)
HIDDEN_TAGS = ("iframe", "noscript", "object", "script", "style", "svg", "template", "title")
# A "<" without ">" is mostly a less-than sign; a parser would drop everything after it.
UNCLOSED_TAG = re.compile("<(?=[^<>]*$)")


def register_visible_text(connection: duckdb.DuckDBPyConnection) -> None:
    """Add the function ``visible_text(text, length)`` to a connection's SQL."""

    def visible_texts(texts: arrow.ChunkedArray, lengths: arrow.ChunkedArray) -> arrow.Array:
        pairs = zip(texts.to_pylist(), lengths.to_pylist(), strict=True)
        shown = [truncate(extract_text(text), length) for text, length in pairs]
        return arrow.array(shown, arrow.string())

    connection.create_function(
        "visible_text", visible_texts, ["VARCHAR", "BIGINT"], "VARCHAR", type=func.ARROW
    )


def extract_text(text: str) -> str:
    """Remove tags, comments and scripts from a text, resolve entities and fold whitespace."""
    if "<" in text or "&" in text:
        closed = DOCUMENT_TAG.sub(" ", UNCLOSED_TAG.sub("&lt;", text))
        text = _parse(BLOCK_TAG.sub(" <", closed))
    return " ".join(text.split())


def truncate(text: str, length: int) -> str:
    """Truncate a text to at most ``length`` characters, between words if it has any space."""
    if len(text) <= length:
        return text
    return text[: length + 1].rpartition(" ")[0] or text[:length]


def _parse(text: str) -> str:
    """Return the text nodes that libxml2 finds; it repairs malformed HTML."""
    parser = etree.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True
    )
    whole = f"<html><body>{text}".replace("\0", "")
    tree = etree.fromstring(whole.encode(), parser)
    etree.strip_elements(tree, *HIDDEN_TAGS, with_tail=False)
    return "".join(tree.itertext())
