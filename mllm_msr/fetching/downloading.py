"""Download of one image from an untrusted server.

Every connection is checked when it is opened, so that neither a redirect nor a changed DNS entry
leads into a private network. Limits on bytes and pixels are enforced while data arrives.
"""

import asyncio
import email.utils
import io
import re
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
# Bytes after which the format is checked; no image has fewer. Content types are ignored, because
# they are often wrong.
FIRST_CHECK_BYTES = 32
# A URL that needs no escapes (RFC 3986).
ENCODED = re.compile(r"(?:[\w.~:/?#\[\]@!$&'()*+,;=-]|%[0-9a-f]{2})+", re.ASCII | re.IGNORECASE)
HEADERS = {
    "User-Agent": f"mllm-msr/{__version__}",
    "Accept": "image/*",
    "Accept-Encoding": "identity",  # images are compressed already
}
# Exception, reason, and whether another attempt may help; the first match counts. Any other error
# is "connection" and transient.
REASONS: tuple[tuple[type[Exception], str, bool], ...] = (
    (TimeoutError, "timeout", True),
    (aiohttp.ClientConnectorCertificateError, "certificate", False),
    (aiohttp.ClientConnectorDNSError, "unknown host", True),
    (ValueError, "bad url", False),
)


class DownloadError(Exception):
    """An attempt to download failed.

    Attributes:
        reason: Short reason, for counts.
        status: The last HTTP status, or None if no server answered.
        transient: Whether another attempt may help.
        wait: Seconds that the server asks to wait before another attempt.
    """

    def __init__(
        self, reason: str, status: int | None = None, transient: bool = False, wait: float = 0.0
    ) -> None:
        """Store the attributes."""
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.transient = transient
        self.wait = wait


def open_session(
    concurrency: int, per_host: int, connect_timeout: float, allow_private: bool
) -> aiohttp.ClientSession:
    """Open a session without cookies, credentials or proxies that connects to public addresses.

    Args:
        concurrency: Maximum simultaneous connections.
        per_host: Maximum simultaneous connections to one host, redirects included.
        connect_timeout: Seconds for one address to accept a connection.
        allow_private: Allow addresses that are not public.
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
    """Return the bytes at a URL. They start like an image, but are not decoded here.

    Args:
        session: From :func:`open_session`.
        url: An absolute http or https URL without credentials.
        timeout: Seconds from the DNS lookup to the last byte.
        max_bytes: Maximum size in bytes.

    Raises:
        DownloadError: The download failed or was refused.
    """
    try:
        async with asyncio.timeout(timeout):
            return await _follow_redirects(session, _parse_url(url), max_bytes)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise _classify_error(error) from error


def find_host(url: str) -> str:
    """Return the host of a URL, or an empty string."""
    try:
        return URL(url).host or ""
    except ValueError:
        return ""


def check_first_bytes(body: bytes | bytearray) -> None:
    """Refuse a body as soon as its first bytes show that it is no image or has too many pixels.

    Raises:
        DownloadError: The body is refused.
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
        return  # the header may be incomplete; the complete body is decoded before it is saved
    if pixels > MAX_PIXELS:
        raise DownloadError("too many pixels", OK)


async def _follow_redirects(session: aiohttp.ClientSession, url: URL, max_bytes: int) -> bytes:
    """Request a URL and follow redirects by hand, to check each of them."""
    status = None
    for _ in range(MAX_REDIRECTS + 1):
        async with session.get(url, allow_redirects=False) as response:
            status = response.status
            location = response.headers.get("Location")
            if status not in (301, 302, 303, 307, 308) or not location:
                return await _read_body(response, max_bytes)
            target = URL(location, encoded=bool(ENCODED.fullmatch(location)))
            url = _parse_url(str(response.url.join(target)))
    raise DownloadError("too many redirects", status)


async def _read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Read a body, and stop as soon as it cannot be an image within the limits."""
    if response.status != OK:
        raise _status_error(response)
    if (response.content_length or 0) > max_bytes:
        raise DownloadError("too many bytes", OK)
    body = bytearray()
    next_check = FIRST_CHECK_BYTES
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            raise DownloadError("too many bytes", OK)
        if len(body) >= next_check:  # the image size has no fixed offset: check again at 2x bytes
            check_first_bytes(body)
            next_check = 2 * len(body)
    return bytes(body)


def _parse_url(text: str) -> URL:
    """Return a URL to request, its path and query as they are written if they are well-formed.

    yarl changes escapes such as ``%2F``, which some servers and signatures tell apart. The checks,
    the scheme and the host are those of yarl's own form.

    Raises:
        DownloadError: The URL is refused.
    """
    url = _check_url(URL(text))
    if not ENCODED.fullmatch(text):
        return url
    written = URL(text, encoded=True)
    if {".", ".."} & set(written.raw_path.split("/")):
        return url
    return URL(f"{url.origin()}{written.raw_path_qs}", encoded=True)


def _check_url(url: URL) -> URL:
    """Refuse a URL that is not plain http or https; its address is checked when connecting."""
    if url.scheme not in ("http", "https"):
        raise DownloadError("refused scheme")
    if url.user is not None or url.password is not None:
        raise DownloadError("refused credentials")
    if not url.host:
        raise DownloadError("bad url")
    return url


def _status_error(response: aiohttp.ClientResponse) -> DownloadError:
    """Return the error for a status other than 200."""
    status = response.status
    if status in (404, 410):
        return DownloadError("not found", status)
    reason = "rate limited" if status == 429 else f"http status {status}"
    transient = status in (408, 425, 429) or status >= 500
    return DownloadError(
        reason, status, transient, _parse_retry_after(response.headers.get("Retry-After"))
    )


def _parse_retry_after(value: str | None) -> float:
    """Return the seconds that a Retry-After header asks for, as digits or as a date."""
    if not value:
        return 0.0
    if value.isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        return date.timestamp() - time.time()  # noqa: TID251  # the pause has a limit
    except ValueError:
        return 0.0


def _classify_error(error: Exception) -> DownloadError:
    """Return the download error for an exception of aiohttp or the network."""
    cause = getattr(error, "os_error", None)
    if isinstance(cause, RefusedAddressError):
        return DownloadError("refused address")
    for kind, reason, transient in REASONS:
        if isinstance(error, kind):
            return DownloadError(reason, transient=transient)
    return DownloadError("connection", transient=True)
