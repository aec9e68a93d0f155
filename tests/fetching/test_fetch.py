"""Downloads from a local HTTP server that misbehaves in the ways that real servers do."""

import io
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from yarl import URL

from mllm_msr import __version__
from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import ImageSources
from mllm_msr.core.tables import write_rows
from mllm_msr.fetching import addresses, downloading
from mllm_msr.fetching import fetch as fetch_module
from mllm_msr.fetching.fetch import FetchOptions, FetchResult, cache_path, fetch
from mllm_msr.images.decoding import encode

Page = Callable[[BaseHTTPRequestHandler], None]
ROOT = Path(__file__).parents[2]
LONG = 30.0  # seconds that no test waits for
RIVER = 200  # chunks of 64 KiB


class Site:
    """A server on loopback: its pages by path, and the requests it got."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.pages: dict[str, Page] = {}
        self.requests: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.chunks = 0
        self.busy: Counter[str] = Counter()
        self.most_busy: Counter[str] = Counter()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer((address, 0), self._handler())
        self.url = f"http://{address}:{self._server.server_port}"
        poll = {"poll_interval": 0.01}
        threading.Thread(target=self._server.serve_forever, kwargs=poll, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, path: str, page: Page) -> str:
        self.pages[path] = page
        return self.url + path

    def good(self, path: str) -> str:
        return self.add(path, answer(image()))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with site._lock:
                    site.requests[self.path] += 1
                    site.headers.append(dict(self.headers))
                with suppress(OSError):  # the client may have seen enough
                    site.pages.get(self.path, answer(b"", 404))(self)

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    # -- pages ------------------------------------------------------------------------------------

    def slow(self, page: Page, seconds: float = LONG) -> Page:
        def wait(request: BaseHTTPRequestHandler) -> None:
            hosts = (request.headers["Host"].rpartition(":")[0], "all")
            with self._lock:
                self.busy.update(hosts)
                self.most_busy |= self.busy
            self.closing.wait(seconds)
            with self._lock:
                self.busy.subtract(hosts)
            page(request)

        return wait

    def stuck(self, body: bytes) -> Page:
        """Send half of a body, then nothing for long."""

        def send(request: BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body[: len(body) // 2])
            self.closing.wait(LONG)

        return send

    def endless(self, start: bytes) -> Page:
        def send(request: BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.end_headers()
            request.wfile.write(start)
            for _ in range(RIVER):
                request.wfile.write(b"\0" * 65536)
                self.chunks += 1

        return send


def answer(body: bytes, status: int = 200, **headers: str) -> Page:
    def send(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(body))} | named).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return send


def undeclared(body: bytes) -> Page:
    def send(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(body)

    return send


def broken(request: BaseHTTPRequestHandler) -> None:
    request.connection.shutdown(socket.SHUT_RDWR)


def redirect(target: str) -> Page:
    return answer(b"", 302, Location=target)


def in_turn(*pages: Page) -> Page:
    """Respond with one page after another, then repeat the last."""
    left = list(pages)

    def send(request: BaseHTTPRequestHandler) -> None:
        page = left.pop(0) if len(left) > 1 else left[0]
        page(request)

    return send


def image(size: tuple[int, int] = (20, 10), form: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).save(buffer, form)
    return buffer.getvalue()


def bomb(side: int = 50_000) -> bytes:
    """Return the start of a PNG with too many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + check + b"\0\0\0\0IDAT"


def late_bomb() -> bytes:
    """Return the start of a JPEG whose size comes after half a megabyte of comments."""
    comment = b"\xff\xfe\xff\xff" + b"-" * 65533
    size = struct.pack(">BHHB", 8, 60_000, 60_000, 1) + b"\1\x11\0"
    return b"\xff\xd8" + comment * 8 + b"\xff\xc0\0\x0b" + size + b"\xff\xda\0\x08\1\1\0\0?\0"


@pytest.fixture
def site() -> Iterator[Site]:
    with closing(Site()) as site:
        yield site


@pytest.fixture(autouse=True)
def waits_are_short(monkeypatch):
    monkeypatch.setattr(fetch_module, "FIRST_WAIT", 0.01)


@pytest.fixture
def loopback_is_public(monkeypatch):
    """Treat 127.0.0.1 as public, and every other address as usual."""
    truth = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda ip: ip == "127.0.0.1" or truth(ip))


def options(**changed: object) -> FetchOptions:
    return FetchOptions(**({"allow_private": True, "attempts": 2} | changed))


def fetched(url: str, cache: Path, **changed: object) -> FetchResult:
    return fetch([url], cache, options(**changed))[url]


def refusal(url: str, cache: Path, **changed: object) -> str | None:
    """Fetch a URL that must fail permanently; return the reason."""
    result = fetched(url, cache, **changed)
    assert result.path is None
    assert result.attempts == 1
    assert files(cache) == []
    return result.reason


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


# -- cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif"])
def test_an_image_is_cached_with_its_original_bytes(tmp_path, site, form):
    body = image((300, 150), form)
    url = site.add("/a", answer(body))
    result = fetched(url, tmp_path)
    assert result == FetchResult(cache_path(tmp_path, url), None, 200, 1)
    assert files(tmp_path) == [result.path]
    assert result.path.read_bytes() == body
    assert encode(result.path, 64)[1] == (64, 32)


def test_results_have_the_order_of_the_urls(tmp_path, site):
    urls = [site.good(f"/{number}") for number in range(9)] + [site.url + "/none"]
    results = fetch(urls[::-1], tmp_path, options())
    assert list(results) == urls[::-1]
    assert [url for url, result in results.items() if result.path is None] == urls[-1:]
    assert all(results[url].path == cache_path(tmp_path, url) for url in urls[:-1])


def test_no_urls_give_no_results(tmp_path, capsys):
    assert fetch([], tmp_path, options()) == {}
    assert capsys.readouterr().err == ""


def test_a_url_is_requested_only_once(tmp_path, site):
    fetch([site.good("/a")] * 5, tmp_path, options())
    fetch([site.url + "/a"] * 5, tmp_path, options())
    assert site.requests == {"/a": 1}


def test_the_next_run_requests_only_failed_urls(tmp_path, site):
    urls = [site.good("/a"), site.add("/b", in_turn(answer(b"", 404), answer(image())))]
    first = fetch(urls, tmp_path, options())
    second = fetch(urls, tmp_path, options())
    assert [result.reason for result in first.values()] == [None, "not found"]
    assert [result.reason for result in second.values()] == [None, None]
    assert [result.attempts for result in second.values()] == [0, 1]
    assert site.requests == {"/a": 1, "/b": 2}


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_only_complete_images_and_is_resumed(tmp_path, site, sent):
    body = image((200, 100))
    urls = [site.add(f"/{number}", answer(body)) for number in range(12)]
    urls += [site.add(f"/slow{number}", site.slow(answer(body))) for number in range(4)]
    program = (
        "import signal, sys; from pathlib import Path; from mllm_msr.fetching.fetch import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # some shells ignore it
        "fetch(sys.argv[2:], Path(sys.argv[1]), FetchOptions(allow_private=True))"
    )
    command = [sys.executable, "-c", program, str(tmp_path), *urls]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ)
    while sum(count for path, count in site.requests.items() if "slow" in path) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sent)
    process.communicate(timeout=LONG)
    assert process.returncode
    assert [path.read_bytes() for path in files(tmp_path)] == [body] * 12
    for url in urls[12:]:
        site.pages[url.removeprefix(site.url)] = answer(body)
    assert all(result.path for result in fetch(urls, tmp_path, options()).values())
    assert all(site.requests[f"/{number}"] == 1 for number in range(12))


@pytest.mark.slow
def test_the_stage_killed_amid_bodies_ends_as_an_undisturbed_one(tmp_path, site):
    body = image((200, 100))
    paths = [f"/{number}" for number in range(12)] + [f"/slow{number}" for number in range(4)]
    for path in paths:
        site.add(path, site.stuck(body) if "slow" in path else answer(body))
    rows = [{"item": path, "file": None, "member": None, "url": site.url + path} for path in paths]
    write_rows(ImageSources, rows, tmp_path / "sources.parquet")
    process = start_stage(tmp_path, "killed")
    while sum(count for path, count in site.requests.items() if "slow" in path) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=LONG)
    assert not any((tmp_path / "killed" / "out").rglob("*.parquet"))
    for path in paths[12:]:
        site.pages[path] = answer(body)
    _, said = start_stage(tmp_path, "killed").communicate()
    assert "error" not in said
    assert [site.requests[path] for path in paths] == [1] * 12 + [2] * 4
    start_stage(tmp_path, "undisturbed").communicate()
    ends = [read_all(tmp_path / name / "out") for name in ("killed", "undisturbed")]
    assert len(ends[0]) == 3
    assert ends[0] == ends[1]


def start_stage(folder: Path, name: str) -> "subprocess.Popen[str]":
    """Start the stage with a state directory and outputs of its own."""
    options = {"image-sources": "sources.parquet", "raw": ".", "out": f"{name}/out"}
    options["params"] = str(ROOT / "params.yaml")
    words = [word for option, value in options.items() for word in (f"--{option}", value)]
    return subprocess.Popen(
        [sys.executable, "-m", "stages.fetch_images", "--allow-private", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(folder / name)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files(folder)}


def test_a_partial_file_of_a_killed_run_is_not_used(tmp_path, site):
    url = site.good("/a")
    path = cache_path(tmp_path, url)
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.1.tmp").write_bytes(image()[:20])
    assert fetched(url, tmp_path).attempts == 1
    assert path.read_bytes() != image()[:20]


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "header"])
def test_a_damaged_file_of_the_cache_is_requested_again(tmp_path, site, caplog, damage):
    urls = [site.good("/a"), site.good("/b")]
    fetch(urls, tmp_path, options())
    path = cache_path(tmp_path, urls[0])
    whole = path.read_bytes()
    damaged = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"<html>" * 99}
    path.write_bytes(damaged.get(damage, bytes(16) + whole[16:]))
    results = fetch(urls, tmp_path, options())
    assert [results[url].attempts for url in urls] == [1, 0]
    assert path.read_bytes() == whole
    assert caplog.text.count("is damaged and counts as missing; check the disk") == 1


def test_a_full_disk_stops_the_run(tmp_path, site, monkeypatch):
    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(DataError, match="got a full disk"):
        fetched(site.good("/a"), tmp_path)
    assert files(tmp_path) == []


# -- retries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "reason", "status"),
    [
        (answer(image(), Content_Length="5000"), "connection", None),
        (answer(b"", 500), "http status 500", 500),
        (answer(b"", 503), "http status 503", 503),
        (answer(b"", 408), "http status 408", 408),
        (answer(b"", 429), "rate limited", 429),
    ],
)
def test_a_transient_error_is_retried(tmp_path, site, page, reason, status):
    passing = site.add("/passing", in_turn(page, answer(image())))
    lasting = site.add("/lasting", page)
    results = fetch([passing, lasting], tmp_path, options(attempts=3))
    assert results[passing] == FetchResult(cache_path(tmp_path, passing), None, 200, 2)
    assert results[lasting] == FetchResult(None, reason, status, 3)
    assert files(tmp_path) == [results[passing].path]


def test_a_broken_connection_is_retried(tmp_path, site):
    # aiohttp itself repeats a request once if no response started.
    passing = site.add("/passing", in_turn(broken, broken, answer(image())))
    lasting = site.add("/lasting", broken)
    results = fetch([passing, lasting], tmp_path, options())
    assert results[passing].attempts == 2
    assert results[lasting] == FetchResult(None, "connection", None, 2)
    assert site.requests == {"/passing": 3, "/lasting": 4}


def test_a_timeout_is_retried(tmp_path, site):
    passing = site.add("/passing", in_turn(site.slow(broken), answer(image())))
    lasting = site.add("/lasting", site.slow(broken))
    results = fetch([passing, lasting], tmp_path, options(timeout=0.3))
    assert results[passing].attempts == 2
    assert results[lasting] == FetchResult(None, "timeout", None, 2)


def test_a_refused_connection_is_a_connection_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = fetched(f"http://127.0.0.1:{port}/a", tmp_path)
    assert result == FetchResult(None, "connection", None, 2)


def test_an_unresolvable_name_is_an_unknown_host(tmp_path):
    assert fetched("http://nobody.invalid/a", tmp_path).reason == "unknown host"


def seconds_until_kept(site: Site, cache: Path, retry_after: str) -> float:
    busy = answer(b"", 429, Retry_After=retry_after)
    start = time.monotonic()
    assert fetched(site.add("/a", in_turn(busy, answer(image()))), cache).attempts == 2
    return time.monotonic() - start


def test_retry_after_in_seconds_is_respected(tmp_path, site):
    assert 1 <= seconds_until_kept(site, tmp_path, "1") < 10


def test_retry_after_as_a_date_is_respected(tmp_path, site):
    # A date has no fractions of seconds.
    assert 0.9 <= seconds_until_kept(site, tmp_path, formatdate(time.time() + 2, usegmt=True)) < 10


@pytest.mark.parametrize("retry_after", ["86400", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_long_retry_after_is_capped(tmp_path, site, monkeypatch, retry_after):
    monkeypatch.setattr(fetch_module, "LONGEST_WAIT", 0.2)
    assert seconds_until_kept(site, tmp_path, retry_after) < 10


@pytest.mark.parametrize("retry_after", ["soon", "-5", "Mon, 01 Jan 1990 00:00:00 GMT"])
def test_an_invalid_retry_after_is_ignored(tmp_path, site, retry_after):
    assert seconds_until_kept(site, tmp_path, retry_after) < 10


def test_waits_grow_and_have_jitter():
    waits = [[fetch_module._back_off(attempt) for _ in range(50)] for attempt in (1, 2, 3)]
    for attempt, some in enumerate(waits):
        assert all(0.005 * 2**attempt <= wait <= 0.015 * 2**attempt for wait in some)
        assert len(set(some)) > 1


# -- refused bodies and URLs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "not found"), (410, "not found"), (403, "http status 403"), (204, "http status 204")],
)
def test_a_permanent_status_is_not_retried(tmp_path, site, status, reason):
    assert refusal(site.add("/a", answer(b"", status)), tmp_path) == reason
    assert fetched(site.url + "/a", tmp_path).status == status


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", ""),
        (b"\x89", ""),
        (b"<html>no such image</html>", " but HTML"),
        (b"%!PS-Adobe-3.0", " but PostScript"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", " but SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", " but HEIC"),
    ],
)
def test_a_body_that_is_no_image_is_refused(tmp_path, site, body, what):
    page = answer(body, Content_Type="image/png")
    assert refusal(site.add("/a", page), tmp_path) == f"not an image{what}"


def test_the_content_type_is_ignored(tmp_path, site):
    assert fetched(site.add("/a", answer(image(), Content_Type="text/html")), tmp_path).path


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif"])
def test_a_truncated_image_without_content_length_is_broken(tmp_path, site, form):
    body = image((200, 200), form)
    assert refusal(site.add("/a", undeclared(body[: len(body) // 2])), tmp_path) == "broken image"


def test_too_many_declared_bytes_are_not_read(tmp_path, site):
    page = answer(b"", Content_Length="1001")
    assert refusal(site.add("/a", page), tmp_path, max_bytes=1000) == "too many bytes"


def test_reading_stops_at_too_many_undeclared_bytes(tmp_path, site):
    url = site.add("/a", site.endless(image()))
    assert refusal(url, tmp_path, max_bytes=100_000) == "too many bytes"
    assert site.chunks < RIVER


def test_exactly_max_bytes_are_accepted(tmp_path, site):
    body = image()
    assert fetched(site.add("/a", undeclared(body)), tmp_path, max_bytes=len(body)).path


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (bomb(10_000), "too many pixels"),
        (bomb(50_000), "too many pixels"),
        (late_bomb(), "too many pixels"),
        (b"<html>", "not an image but HTML"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_reading_stops_as_soon_as_a_body_is_refused(tmp_path, site, start, reason):
    assert refusal(site.add("/a", site.endless(start)), tmp_path) == reason
    assert site.chunks < RIVER


@pytest.mark.parametrize(
    "url", ["ftp://a.example/a.png", "file:///etc/hosts", "data:image/png;base64,AA", "/a.png", ""]
)
def test_other_schemes_than_http_are_refused(tmp_path, url):
    assert refusal(url, tmp_path) == "refused scheme"


@pytest.mark.parametrize("who", ["me:secret@", "me@", ":secret@"])
def test_a_url_with_credentials_is_refused(tmp_path, site, who):
    url = site.good("/a").replace("//", f"//{who}")
    assert refusal(url, tmp_path) == "refused credentials"
    assert not site.requests


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///a", "http://a:99999/", "http://[1", "http://" + "a" * 70, "http://\ud800"],
)
def test_an_invalid_url_is_a_bad_url(tmp_path, url):
    assert refusal(url, tmp_path) == "bad url"


# -- addresses and redirects -----------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"])
def test_a_private_address_is_refused_in_any_notation(tmp_path, site, host):
    url = site.good("/a").replace("127.0.0.1", host)
    assert refusal(url, tmp_path, allow_private=False) == "refused address"
    assert not site.requests


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f000001", "0177.0.0.1"])
def test_a_private_address_in_noncanonical_digits_is_refused(tmp_path, site, host):
    url = site.good("/a").replace("127.0.0.1", host)
    # Some releases of aiohttp refuse it before connecting.
    assert refusal(url, tmp_path, allow_private=False) in ("refused address", "bad url")
    assert not site.requests


@pytest.mark.usefixtures("loopback_is_public")
def test_a_name_with_private_addresses_is_refused(tmp_path, site, monkeypatch):
    def resolve(host: str, port: int, *_: object, **__: object) -> list[tuple]:
        found = {"mixed.example": ("127.0.0.2", "127.0.0.1"), "private.example": ("127.0.0.2",)}
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (address, port)) for address in found[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with closing(Site("127.0.0.2")) as private:
        mixed = site.good("/a").replace("127.0.0.1", "mixed.example")
        assert fetched(mixed, tmp_path / "mixed", allow_private=False).path
        url = private.good("/a").replace("127.0.0.2", "private.example")
        assert refusal(url, tmp_path / "private", allow_private=False) == "refused address"
        assert not private.requests


@pytest.mark.parametrize("times", [1, 5])
def test_a_few_redirects_are_followed(tmp_path, site, times):
    url = site.good("/0")
    for number in range(times):
        url = site.add(f"/{number + 1}", redirect(f"/{number}"))
    assert fetched(url, tmp_path).path == cache_path(tmp_path, url)


def test_a_redirect_loop_is_stopped(tmp_path, site):
    assert refusal(site.add("/a", redirect("/a")), tmp_path) == "too many redirects"
    assert site.requests == {"/a": 6}


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("ftp://a.example/a.png", "refused scheme"),
        ("file:///etc/hosts", "refused scheme"),
        ("http://me:secret@127.0.0.1/", "refused credentials"),
        ("http://[1", "bad url"),
        ("http://169.254.169.254/latest/meta-data/", "refused address"),
    ],
)
@pytest.mark.usefixtures("loopback_is_public")
def test_a_redirect_is_checked_like_any_url(tmp_path, site, target, reason):
    result = fetched(site.add("/a", redirect(target)), tmp_path, allow_private=False)
    assert result.reason == reason


ESCAPED = "/a%2Bb%2fc.png?u=https%3A%2F%2Fa.org%2Fi&sig=a%2Bb%3D%3d"


def test_a_url_is_requested_as_it_is_written(tmp_path, site):
    assert fetched(site.good(ESCAPED), tmp_path).path
    assert site.requests == {ESCAPED: 1}


@pytest.mark.parametrize("target", [ESCAPED, "{site}" + ESCAPED, "." + ESCAPED])
def test_a_redirect_is_requested_as_it_is_written(tmp_path, site, target):
    site.good(ESCAPED)
    url = site.add("/first", redirect(target.format(site=site.url)))
    assert fetched(url, tmp_path).path
    assert site.requests == {"/first": 1, ESCAPED: 1}


@pytest.mark.parametrize(
    ("path", "requested"),
    [
        ("/a b.png", "/a%20b.png"),
        ("/caf\xe9.png", "/caf%C3%A9.png"),
        ("/100%.png", "/100%25.png"),
        ("/a/../b%3A.png", "/b:.png"),
        ("/a%3Ab.png#part", "/a%3Ab.png"),
    ],
)
def test_other_urls_are_requested_in_their_normal_form(tmp_path, site, path, requested):
    site.good(requested)
    assert fetched(site.url + path, tmp_path).path
    assert site.requests == {requested: 1}


@pytest.mark.parametrize(
    "text",
    [
        "http://EXAMPLE.org/%2F",
        "http://example.org:80?q=%3A",
        "http://[::1]:8080/%3A",
        "http://0x7f.1/%2F",
        "http://example.org./%2F",
        "https://a.org#@b.org/%2F",
    ],
)
def test_the_host_of_a_written_url_is_that_of_its_normal_form(text):
    url, normal = downloading._parse_url(text), URL(text)
    assert (url.scheme, url.host, url.port) == (normal.scheme, normal.host, normal.port)
    assert url.raw_path_qs == URL(text, encoded=True).raw_path_qs


@pytest.mark.usefixtures("loopback_is_public")
def test_a_redirect_into_a_private_network_is_refused(tmp_path, site):
    with closing(Site("127.0.0.2")) as private:
        inner = private.good("/secret.png")
        url = site.add("/a", redirect(inner))
        assert refusal(url, tmp_path, allow_private=False) == "refused address"
        assert not private.requests
        assert fetched(url, tmp_path, allow_private=True).path  # the redirect itself was fine


def test_requests_have_a_user_agent_and_no_cookies_or_credentials(tmp_path, site, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    urls = [site.add(f"/{number}", answer(image(), Set_Cookie="who=1")) for number in range(3)]
    urls = [url.replace("127.0.0.1", "localhost") for url in urls]  # numbers have no cookies anyway
    results = fetch(urls, tmp_path, options(concurrency=1))
    assert all(result.path for result in results.values())
    for headers in site.headers:
        assert headers["User-Agent"] == f"mllm-msr/{__version__}"
        assert headers.keys() == {"Host", "User-Agent", "Accept", "Accept-Encoding"}


# -- concurrency and failures ----------------------------------------------------------------------


def test_connections_are_limited_per_host_and_in_total(tmp_path, site):
    urls = [site.add(f"/{n}", site.slow(answer(image()), 0.05)) for n in range(12)]
    urls += [url.replace("127.0.0.1", "localhost") for url in urls]
    results = fetch(urls, tmp_path, options(per_host=2, concurrency=3))
    assert all(result.path for result in results.values())
    assert site.most_busy == {"127.0.0.1": 2, "localhost": 2, "all": 3}


def test_redirects_to_one_host_share_its_limit(tmp_path, site):
    urls = []
    for number in range(8):
        target = site.add(f"/{number}", site.slow(answer(image()), 0.05))
        other = site.add(f"/other{number}", redirect(target)).replace("127.0.0.1", "localhost")
        urls += [target, other]
    assert all(result.path for result in fetch(urls, tmp_path, options(per_host=2)).values())
    assert site.most_busy["127.0.0.1"] == 2


def test_waiting_for_a_connection_is_no_timeout(tmp_path, site):
    urls = [site.add(f"/{n}", site.slow(answer(image()), 0.2)) for n in range(4)]
    results = fetch(urls, tmp_path, options(per_host=4, concurrency=1, timeout=0.7))
    assert [result.attempts for result in results.values()] == [1] * 4


def test_a_slow_host_does_not_delay_others(tmp_path, site):
    slow = [site.add(f"/slow{n}", site.slow(answer(image()), 0.3)) for n in range(4)]
    quick = [site.good(f"/{n}").replace("127.0.0.1", "localhost") for n in range(8)]
    fetch([*slow, *quick], tmp_path, options(per_host=2, concurrency=4))
    order = [headers["Host"].rpartition(":")[0] for headers in site.headers]
    assert Counter(order[:10]) == {"127.0.0.1": 2, "localhost": 8}


def test_an_outage_stops_the_run_with_its_reasons(tmp_path, site):
    busy = [site.add(f"/busy{number}", answer(b"", 503)) for number in range(100)]
    urls = [site.good("/a"), *busy]
    with pytest.raises(DataError) as error:
        fetch(urls, tmp_path, options(attempts=1))
    assert "at most 50% of images so far to fail for a time" in str(error.value)
    assert "got 20 failures of" in str(error.value)
    assert "(20 x http status 503)" in str(error.value)
    assert sum(site.requests.values()) < 40
    assert files(tmp_path) == [cache_path(tmp_path, urls[0])]


def test_dead_urls_never_stop_a_run(tmp_path, site):
    urls = [f"{site.url}/none{number}" for number in range(40)]
    urls += [site.good(f"/{number}") for number in range(20)]
    results = fetch(urls, tmp_path, options(max_failed_share=0.0))
    assert sum(result.path is None for result in results.values()) == 40


def test_few_transient_failures_never_stop_a_run(tmp_path, site):
    urls = [site.add(f"/busy{number}", answer(b"", 503)) for number in range(19)]
    assert len(fetch(urls, tmp_path, options(attempts=1, max_failed_share=0.0))) == 19


def test_cached_files_count_as_successes(tmp_path, site):
    urls = [site.good(f"/{number}") for number in range(30)]
    urls += [site.add(f"/busy{number}", answer(b"", 503)) for number in range(25)]
    for _ in range(2):
        results = fetch(urls, tmp_path, options(per_host=1, attempts=1))
        assert sum(result.path is None for result in results.values()) == 25


def test_progress_with_a_total_goes_to_standard_error(tmp_path, site, capsys):
    urls = [site.good(f"/{number}") for number in range(3)]
    fetch(urls[:2], tmp_path, options())
    assert "2/2" in capsys.readouterr().err
    fetch([*urls, site.url + "/none"], tmp_path, options())
    shown = capsys.readouterr()
    assert "2/4" in shown.err
    assert "4/4" in shown.err
    assert shown.out == ""
