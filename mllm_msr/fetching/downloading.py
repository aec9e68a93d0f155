"""One image from a stranger's server: asked for politely, and read no further than is needed.

Every connection is checked where it is opened, so neither a redirect nor a name that resolves anew
leads into a private network. Bytes and pixels are bounded while they arrive.
"""

import asyncio
import email.utils
import io
import time

import aiohttp
from PIL import Image
from yarl import URL

from mllm_msr import __version__
from mllm_msr.fetching.addresses import RefusedAddressError, public_socket
from mllm_msr.images.decoding import MAX_PIXELS, UNREADABLE
from mllm_msr.images.formats import FORMATS, HEAD, find_format

OK = 200
MAX_REDIRECTS = 5
# Bytes after which the format is looked at; no image has fewer. Content types are not asked:
# they are often wrong, and the bytes decide anyway.
FIRST_LOOK = 32
HEADERS = {
    "User-Agent": f"mllm-msr/{__version__}",
    "Accept": "image/*",
    "Accept-Encoding": "identity",  # images are compressed already
}
# What an exception of a download is called, and whether another attempt may help; the first that
# fits counts. Whatever else happens on the way is "connection" and may pass.
REASONS: tuple[tuple[type[Exception], str, bool], ...] = (
    (TimeoutError, "timeout", True),
    (aiohttp.ClientConnectorCertificateError, "certificate", False),
    (aiohttp.ClientConnectorDNSError, "unknown host", True),
    (ValueError, "bad url", False),
)


class DownloadError(Exception):
    """One attempt failed.

    Attributes:
        reason: Why, in a word or two to count by.
        status: The last HTTP status, where a server answered.
        passes: Whether another attempt may help.
        wait: Seconds that the server asks to wait before it.
    """

    def __init__(
        self, reason: str, status: int | None = None, passes: bool = False, wait: float = 0.0
    ) -> None:
        """Take what the attributes say."""
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.passes = passes
        self.wait = wait


def open_session(
    concurrency: int, per_host: int, connect_timeout: float, allow_private: bool
) -> aiohttp.ClientSession:
    """Open a session that tells servers nothing and connects to public addresses only.

    Args:
        concurrency: Most connections at once.
        per_host: Most connections to one host at once, redirects included.
        connect_timeout: Seconds for one address to accept a connection.
        allow_private: Whether addresses that are not public may be connected to.
    """
    connector = aiohttp.TCPConnector(
        limit=concurrency,
        limit_per_host=per_host,
        socket_factory=None if allow_private else public_socket,
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout),
        headers=HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,  # a proxy would connect to private addresses for us
    )


async def download(
    session: aiohttp.ClientSession, url: str, timeout: float, max_bytes: int
) -> bytes:
    """Give the bytes that a URL leads to; they begin like an image, but may not be one.

    Args:
        session: From :func:`open_session`.
        url: An absolute http or https URL without credentials.
        timeout: Seconds from the look-up of the name to the last byte.
        max_bytes: Most bytes.

    Raises:
        DownloadError: Whatever went wrong on the way.
    """
    try:
        async with asyncio.timeout(timeout):
            return await _follow(session, _checked(URL(url)), max_bytes)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise _explain(error) from error


def find_host(url: str) -> str:
    """Give the host that a URL names, or nothing."""
    try:
        return URL(url).host or ""
    except ValueError:
        return ""


def check_beginning(body: bytes | bytearray) -> None:
    """Refuse what is no image or has too many pixels, as soon as the bytes so far tell.

    Raises:
        DownloadError: They do.
    """
    found = find_format(bytes(body[:HEAD]))
    if found not in FORMATS:
        raise DownloadError(f"not an image but {found}" if found else "not an image", OK)
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except UNREADABLE:
        return  # the header may still be on its way; a whole body is decoded before it is kept
    if pixels > MAX_PIXELS:
        raise DownloadError("too many pixels", OK)


async def _follow(session: aiohttp.ClientSession, url: URL, max_bytes: int) -> bytes:
    """Ask for a URL and, by hand, for those that it redirects to: each is checked."""
    status = None
    for _ in range(MAX_REDIRECTS + 1):
        async with session.get(url, allow_redirects=False) as response:
            status = response.status
            location = response.headers.get("Location")
            if status not in (301, 302, 303, 307, 308) or not location:
                return await _read(response, max_bytes)
            url = _checked(response.url.join(URL(location)))
    raise DownloadError("too many redirects", status)


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Read a body, no further than it may still become an image within the limits."""
    if response.status != OK:
        raise _refusal(response)
    if (response.content_length or 0) > max_bytes:
        raise DownloadError("too many bytes", OK)
    body = bytearray()
    enough = FIRST_LOOK
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            raise DownloadError("too many bytes", OK)
        if len(body) >= enough:  # a size has no fixed place: look again at twice the bytes
            check_beginning(body)
            enough = 2 * len(body)
    return bytes(body)


def _checked(url: URL) -> URL:
    """Refuse a URL that is not plain http or https; addresses are checked on connecting."""
    if url.scheme not in ("http", "https"):
        raise DownloadError("refused scheme")
    if url.user is not None or url.password is not None:
        raise DownloadError("refused credentials")
    if not url.host:
        raise DownloadError("bad url")
    return url


def _refusal(response: aiohttp.ClientResponse) -> DownloadError:
    """Name a status that is not 200."""
    status = response.status
    if status in (404, 410):
        return DownloadError("not found", status)
    reason = "rate limited" if status == 429 else f"http status {status}"
    passes = status in (408, 425, 429) or status >= 500
    return DownloadError(reason, status, passes, _retry_after(response.headers.get("Retry-After")))


def _retry_after(value: str | None) -> float:
    """Give the seconds that a Retry-After header asks for, in digits or as a date."""
    if not value:
        return 0.0
    if value.isdecimal():
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0


def _explain(error: Exception) -> DownloadError:
    """Name what went wrong between a URL and its body."""
    cause = getattr(error, "os_error", None)
    if isinstance(cause, RefusedAddressError):
        return DownloadError("refused address")
    for kind, reason, passes in REASONS:
        if isinstance(error, kind):
            return DownloadError(reason, passes=passes)
    return DownloadError("connection", passes=True)
