"""The page in a real browser: nothing leaves, nothing in data runs, everybody can use it."""

import httpx
import pytest
from browser import PHONE, Visit
from fake_recommender import HOSTILE, FakeRecommender

from mllm_msr.serving.guards import Limits

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

KEY = "a key of enough letters"


class ServiceVisit(Visit):
    """A page of the service."""

    def __init__(self, browser: "sync_api.Browser", url: str, **options: object) -> None:
        super().__init__(browser, url, **options)
        self.page.wait_for_load_state("networkidle")

    def recommend(self, user: str) -> None:
        self.page.fill("#user", user)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#ranking li")


@pytest.fixture
def visit(browser: "sync_api.Browser", client: httpx.Client):
    """Return a function that opens a page of the service with a context's options."""
    visits: list[ServiceVisit] = []

    def open_page(path: str = "/", **options: object) -> ServiceVisit:
        visits.append(ServiceVisit(browser, str(client.base_url.join(path)), **options))
        return visits[-1]

    yield open_page
    for each in visits:
        each.page.close()


def test_the_page_asks_its_own_service_alone(visit, client: httpx.Client) -> None:
    for path in ("/", "/docs"):
        opened = visit(path)
        own = (str(client.base_url), f"blob:{client.base_url}")
        assert [url for url in opened.requests if not url.startswith(own)] == []
        assert opened.complaints == []


def test_a_user_gets_history_preference_and_ranking(visit) -> None:
    opened = visit()
    opened.recommend("u1")
    page = opened.page
    assert page.locator("#history .title").all_inner_texts() == ["Lamp 1", "Lamp 2"]
    assert page.locator("#preferences li").last.inner_text() == "likes lamps"
    assert "p(yes) 0.500" in page.locator("#ranking li").first.inner_text()
    assert page.locator("#ranking li").count() == 12
    assert page.locator("#history img").first.is_visible()


def test_a_history_is_put_together_by_keyboard(visit, fake: FakeRecommender) -> None:
    page = visit().page
    page.fill("#search", "lamp 2")
    page.keyboard.press("Enter")
    page.wait_for_selector("#items li:nth-child(12):last-child")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert "number 1 of the history" in page.locator("#status").inner_text()
    page.focus("#recommend")
    page.keyboard.press("Enter")
    page.wait_for_selector("#ranking li")
    assert fake.batches[-1][0].history == ["i2"]
    assert page.evaluate("document.activeElement.id") == "ranking-heading"
    page.get_by_role("button", name="Remove Lamp 2").press("Enter")
    assert page.locator("#history li").count() == 0
    assert page.locator("#recommend").is_disabled()


def test_markup_in_titles_and_preferences_is_shown_and_not_run(visit) -> None:
    opened = visit()
    opened.recommend("u1")
    assert HOSTILE in opened.page.locator("#ranking").inner_text()
    assert HOSTILE in opened.page.locator("#preferences").inner_text()
    assert opened.page.evaluate("document.documentElement.dataset.owned") is None


def test_a_script_that_gets_into_the_page_does_not_run(visit) -> None:
    opened = visit()
    opened.page.evaluate(
        "text => document.body.insertAdjacentHTML('beforeend', text)",
        "<img src=x onerror='document.documentElement.dataset.owned = 1'>",
    )
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("document.documentElement.dataset.owned") is None
    assert any("Content Security Policy" in each for each in opened.complaints)


def test_a_refusal_is_shown(visit) -> None:
    page = visit().page
    page.fill("#user", "nobody")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.wrong")
    assert "the closest one is 'u1'" in page.locator("#status").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, None])
def test_everybody_can_use_the_page(visit, scheme: str, viewport: object) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    opened = visit(color_scheme=scheme, viewport=viewport or {"width": 1100, "height": 900})
    opened.recommend("u1")
    assert axe.run(opened.page).response["violations"] == []
    width = opened.page.evaluate("document.documentElement.scrollWidth")
    assert width == opened.page.evaluate("innerWidth")
    docs = visit("/docs", color_scheme=scheme)
    assert axe.run(docs.page).response["violations"] == []


def test_the_page_asks_for_a_key_and_sends_it(browser, serve_fake) -> None:
    client = serve_fake(Limits(seconds=5, api_key=KEY))
    opened = ServiceVisit(browser, str(client.base_url))
    page = opened.page
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#items li")
    page.wait_for_selector("#items img:visible")
    assert not any(KEY in url for url in opened.requests)
    page.close()
