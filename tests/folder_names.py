"""Folder names that some program treats as a pattern, URL or partition."""

from hypothesis import strategies as st

SPECIAL = "[]*?{}'\"%=~:!#$,;& "
ODD = [
    *("games [2]", "my *data?", "**", "[!x]", "{a,b}", "it's", "a%20b", "user=7", "~", "été ✓"),
    *("s3:", "file:", "hdfs:", "http:", "a.gz", "a.zip"),
]

folder_names = st.sampled_from(ODD) | st.text(
    st.sampled_from(SPECIAL)
    | st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"),
    min_size=1,
    max_size=12,
).filter(lambda name: name not in {".", ".."})
"""Folder names without backslashes, which DuckDB treats as separators in a pattern."""
