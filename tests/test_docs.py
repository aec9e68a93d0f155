import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# The changelog names old paths too, and worked examples add files of their own.
CURRENT = [page for page in PAGES if page.name not in {"CHANGELOG.md", "extending.md"}]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_PATH = re.compile(r"(?<![\w./-])(?:mllm_msr|stages|bench|tests|docs)/[\w./-]*[\w/](?![\w*<{])")
MODULE = re.compile(r"python -m ((?:mllm_msr|stages|bench)[\w.]*\w)")
COMMAND = re.compile(r"mllm-msr ([a-z]+)")

of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
of_every_current_page = pytest.mark.parametrize(
    "page", CURRENT, ids=lambda page: str(page.relative_to(ROOT))
)


@of_every_page
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue  # an address outside the repository
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in set(anchors_of(target)), link


@of_every_current_page
def test_every_path_of_code_exists(page: Path) -> None:
    paths = CODE_PATH.findall(page.read_text(encoding="utf-8"))
    assert [path for path in sorted(set(paths)) if not (ROOT / path).exists()] == []


@of_every_current_page
def test_every_module_that_is_run_exists(page: Path) -> None:
    modules = set(MODULE.findall(page.read_text(encoding="utf-8"))) - {"stages.x"}
    assert [name for name in sorted(modules) if find_spec(name) is None] == []


@of_every_current_page
def test_every_subcommand_exists(page: Path) -> None:
    from mllm_msr.cli import SUBCOMMANDS

    assert set(COMMAND.findall(page.read_text(encoding="utf-8"))) <= set(SUBCOMMANDS)


def test_the_index_lists_every_page_of_the_docs() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == {link for link in LINK.findall(index) if "/" not in link}


def anchors_of(page: Path) -> Iterator[str]:
    """Yield the anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
