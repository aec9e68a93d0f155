"""The visible text of HTML, malformed and hostile markup included."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_msr.data.sources.markup import extract_text, truncate


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Red  kettle ", "Red kettle"),
        ("AT&amp;T &copy; &#8217;&nbsp;R&D", "AT&T © ’ R&D"),
        ("one<br>two<br/>three", "one two three"),
        ("<ul><li>one</li><li>two</li></ul>three", "one two three"),
        ("H<sub>2</sub>O, <b>bo</b>ld", "H2O, bold"),
        ("a<script>x = 1</script><style>p {}</style><!-- c -->b", "ab"),
        ("ages <5 and >3, a < b", "ages <5 and >3, a < b"),
        ("a<b and c", "a<b and c"),
        ("cut <b", "cut <b"),
        ("<p>open <i>tags", "open tags"),
        ("<?xml version='1.0' encoding='utf-16'?>é", "é"),
        ("<html><body>one</body></html> two", "one two"),
        ("<BODY class='x'>one</Body >two</HTML><p>three</p>", "one two three"),
        ("a<html-part>b</html-part>c", "abc"),
        ("&lt;b&gt; stays", "<b> stays"),
        ("a\0<b>b</b>", "ab"),
        ("<BR/>one<Li class='x'>two<pre>three", "one two three"),
        ("<present>one</present>two", "onetwo"),
        ("one&#1;<br>two", "one\x01 two"),  # control characters are the concern of cleaning
        ("<br>", ""),
        ("<img src=x onerror=alert(1)>", ""),
        ("", ""),
    ],
)
def test_tags_are_removed_and_entities_resolved(text, seen):
    assert extract_text(text) == seen


@pytest.mark.parametrize(
    "part", ["<", "&", "<b>", "<a ", "</", "<!--", "<![CDATA[", "<div>", "<p><b>", "<table>"]
)
def test_hostile_markup_is_parsed_quickly(part):
    start = time.monotonic()
    extract_text(part * 50_000)
    assert time.monotonic() - start < 5  # seconds; html.parser takes minutes for some of them


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_becomes_words_with_single_spaces(text):
    seen = extract_text(text)
    assert seen == " ".join(seen.split())
    if not {"<", "&"} & set(text):
        assert seen == " ".join(text.split())


PIECES = [
    *("</html>", "<frameset>", "<body>", "<head>", "<title>", "<svg>", "<select>", "<tr>", "<?x"),
    *(
        "<textarea>",
        "<plaintext>",
        "<![CDATA[",
        "]]>",
        "<!DOCTYPE html>",
        "<!--",
        "-->",
        "<a href='",
    ),
    *("<", "&", ">", "\0", "\x01", "\ufffe", "&#0;", "&#1;", "&#xD800;", "<p:q>", "é", " "),
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_markup_is_accepted(pieces):
    assert "\0" not in extract_text("".join([*pieces, "<b>"]))


@given(st.text("ab ", max_size=30), st.integers(1, 20))
def test_a_truncated_text_is_a_prefix_within_the_length(text, length):
    short = truncate(text, length)
    assert len(short) <= length
    assert text.startswith(short)
    assert len(text) > length or short == text
