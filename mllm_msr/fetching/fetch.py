"""Download of many images into a cache: concurrency, retries, and a stop in an outage.

The cache lies in the state directory, outside the pipeline's outputs, so that a killed run
continues where it was and the next run requests only what failed. Files are written atomically, and
only if they decode.
"""

import asyncio
import hashlib
import logging
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import aiohttp
from PIL import Image
from tqdm import tqdm

from mllm_msr.core.cpus import available_cpus
from mllm_msr.core.errors import DataError, shorten
from mllm_msr.core.files import atomic_write
from mllm_msr.fetching.downloading import (
    OK,
    DownloadError,
    check_first_bytes,
    download,
    find_host,
    open_session,
)
from mllm_msr.images.decoding import (
    OR_ALLOW_FAILURES,
    Failures,
    ImageLocation,
    encode,
    max_failures,
)

log = logging.getLogger(__name__)

FIRST_WAIT = 1.0  # seconds before the second attempt; doubles with each further attempt
LONGEST_WAIT = 60.0  # seconds, also if a server asks for more
MIN_FAILURES = 20  # transient ones before their share is checked: fewer may be bad luck
CHECKED_SIDE = 16  # pixels; enough to check that an image decodes


@dataclass(frozen=True)
class FetchOptions:
    """How images are fetched.

    Attributes:
        concurrency: Maximum simultaneous connections; as many bodies are held in memory.
        per_host: Maximum simultaneous connections to one host.
        timeout: Seconds for one attempt, from the DNS lookup to the last byte.
        connect_timeout: Seconds for one address to accept a connection.
        attempts: Maximum attempts per URL; within one, aiohttp may repeat a request if the
            connection breaks before the response.
        max_bytes: Maximum size of an image in bytes.
        max_failed_share: Share of URLs so far with transient failures above which fetching stops.
        allow_private: Allow addresses that are not public.
    """

    concurrency: int = 16
    per_host: int = 4
    timeout: float = 60.0
    connect_timeout: float = 10.0
    attempts: int = 4
    max_bytes: int = 20_000_000
    max_failed_share: float = 0.5
    allow_private: bool = False


@dataclass(frozen=True)
class FetchResult:
    """The result of fetching a URL.

    Attributes:
        path: The cached file with the original bytes; None if fetching failed.
        reason: Short reason of the failure, for counts; None if it succeeded.
        status: The last HTTP status of this run, or None if no server answered.
        attempts: Attempts made in this run; 0 if the file was cached before.
    """

    path: Path | None
    reason: str | None = None
    status: int | None = None
    attempts: int = 0


def fetch(
    urls: Iterable[str],
    cache: Path,
    options: FetchOptions,
    results: dict[str, FetchResult] | None = None,
) -> dict[str, FetchResult]:
    """Fetch the images that are not in the cache yet, or that no longer decode there.

    Failures are not cached: the next call tries them again.

    Args:
        urls: Absolute http or https URLs; duplicates are fetched once.
        cache: The folder of fetched files.
        options: Limits.
        results: Filled with each URL's result as soon as it is known, so that the caller has them
            even if fetching stops with an error.

    Returns:
        The result of each URL, in the order of first appearance.

    Raises:
        DataError: The disk is full, or there is an outage: more than ``max_failed_share`` of the
            URLs so far had only transient failures, where cached ones count as successes. Files
            fetched until then stay in the cache.
    """
    unique = list(dict.fromkeys(urls))
    results = {} if results is None else results
    results |= {url: FetchResult(path) for url, path in _find_cached(unique, cache)}
    missing = [url for url in unique if url not in results]
    bar: tqdm[NoReturn] = tqdm(
        None, "fetched", len(unique), initial=len(results), disable=not unique
    )
    with bar, warnings.catch_warnings():
        # Too many pixels are an error of ours already.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        asyncio.run(_fetch_all(missing, cache, options, results, bar))
    return {url: results[url] for url in unique}


def locate(
    images: Iterable[Mapping[str, str]],
    cache: Path,
    options: FetchOptions,
    failures: Failures,
    raw: Path,
) -> list[ImageLocation]:
    """Fetch images on the web, and return the location of every image.

    Args:
        images: Rows of the table ImageSources.
        cache: As for :func:`fetch`.
        options: As for :func:`fetch`.
        failures: Collects the images that cannot be fetched.
        raw: The folder of the raw files, in which local images must lie.

    Raises:
        DataError: Too many failed, or the disk is full; ``failures`` has all that failed.
    """
    rows = list(images)
    fetched: dict[str, FetchResult] = {}
    try:
        fetch([row["url"] for row in rows if row["url"]], cache, options, fetched)
    except DataError:
        _note_failures(rows, fetched, failures)
        raise
    errors = _note_failures(rows, fetched, failures)
    if errors:
        failures.check(*errors[-1])
    located = []
    for row in rows:
        if not row["url"]:
            located.append(ImageLocation(row["item"], Path(row["file"]), row["member"], raw))
        elif path := fetched[row["url"]].path:
            located.append(ImageLocation(row["item"], path))
    return located


def _note_failures(
    rows: Sequence[Mapping[str, str]], fetched: Mapping[str, FetchResult], failures: Failures
) -> list[tuple[str, DataError]]:
    """Record all images that could not be fetched; return their items and errors."""
    errors = [
        (row["item"], _fetch_error(row["url"], fetched[row["url"]]))
        for row in rows
        if row["url"] in fetched and fetched[row["url"]].reason
    ]
    for item, error in errors:
        failures.note(item, error)
    return errors


def _fetch_error(url: str, fetched: FetchResult) -> DataError:
    """Return the user error for an image that could not be fetched."""
    times = "once" if fetched.attempts == 1 else f"{fetched.attempts} times"
    got = f"{fetched.reason}, tried {times}"
    return DataError(
        expected="an image",
        got=got,
        where=shorten(url),
        fix=f"correct its URL, {OR_ALLOW_FAILURES}",
    )


def cache_path(cache: Path, url: str) -> Path:
    """Return the path of a URL's file in the cache, whether it exists or not."""
    digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    return cache / digest[:2] / digest[2:4] / digest


def _find_cached(urls: Sequence[str], cache: Path) -> Iterator[tuple[str, Path]]:
    """Yield the URLs whose files are in the cache and decode, with their paths."""
    with warnings.catch_warnings(), ThreadPoolExecutor(available_cpus()) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        paths = [cache_path(cache, url) for url in urls]
        for url, path, intact in zip(urls, paths, pool.map(_is_intact, paths), strict=True):
            if intact:
                yield url, path


def _is_intact(path: Path) -> bool:
    """Return whether a cached file exists and decodes; log where it does not decode."""
    if not path.is_file():
        return False
    try:
        encode(path, CHECKED_SIDE)
    except DataError:
        log.warning("%s is damaged and counts as missing; check the disk", path)
        return False
    return True


async def _fetch_all(
    urls: Sequence[str],
    cache: Path,
    options: FetchOptions,
    results: dict[str, FetchResult],
    bar: "tqdm[NoReturn]",
) -> None:
    """Fetch from all hosts concurrently, so that a slow one does not delay the others."""
    hosts: defaultdict[str, list[str]] = defaultdict(list)
    for url in urls:
        hosts[find_host(url)].append(url)
    # A separate pool, because asyncio's own threads are needed for DNS lookups.
    with ThreadPoolExecutor(available_cpus()) as pool:
        async with open_session(
            options.concurrency, options.per_host, options.connect_timeout, options.allow_private
        ) as session:
            semaphore = asyncio.Semaphore(options.concurrency)
            fetcher = _Fetcher(session, pool, cache, options, results, bar, semaphore)
            try:
                async with asyncio.TaskGroup() as group:
                    for host_urls in hosts.values():
                        queue = iter(host_urls)
                        for _ in range(min(options.per_host, len(host_urls))):
                            group.create_task(fetcher.fetch_all(queue))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # the others are simultaneous


@dataclass
class _Fetcher:
    """The state that all tasks of a run share."""

    session: aiohttp.ClientSession
    pool: ThreadPoolExecutor
    cache: Path
    options: FetchOptions
    results: dict[str, FetchResult]
    bar: "tqdm[NoReturn]"
    semaphore: asyncio.Semaphore
    transient: Counter[str] = field(default_factory=Counter)  # reasons of URLs given up

    async def fetch_all(self, urls: Iterator[str]) -> None:
        """Fetch URLs one after another from an iterator that several tasks share."""
        for url in urls:
            fetched = await self.fetch(url)
            self.results[url] = fetched
            self.bar.update()
            self.refuse_outage()

    async def fetch(self, url: str) -> FetchResult:
        """Fetch a URL, with retries while its error is transient."""
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self.semaphore:  # until the body is saved, to bound memory
                    options = self.options
                    body = await download(self.session, url, options.timeout, options.max_bytes)
                    path = await self.save(url, body)
                return FetchResult(path, None, OK, attempt)
            except DownloadError as error:
                if not error.transient or attempt >= self.options.attempts:
                    if error.transient:
                        self.transient[error.reason] += 1
                    return FetchResult(None, error.reason, error.status, attempt)
                pause = max(error.wait, _back_off(attempt))
            await asyncio.sleep(min(pause, LONGEST_WAIT))

    async def save(self, url: str, body: bytes) -> Path:
        """Check and save a body in a thread, because decoding takes time."""
        path = cache_path(self.cache, url)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.pool, _save_image, path, body)
        return path

    def refuse_outage(self) -> None:
        """Stop the run if so many URLs fail for transient reasons that the network must be down.

        Other failures do not stop it: they are the URLs' own, and the caller wants all of them.
        Cached files count as successes: a second run requests only the URLs that failed in the
        first, and all of them may fail again.

        Raises:
            DataError: Too many failed.
        """
        failed, done = self.transient.total(), len(self.results)
        share = self.options.max_failed_share
        if failed < MIN_FAILURES or failed <= max_failures(share, done):
            return
        reasons = ", ".join(
            f"{count} x {reason}" for reason, count in self.transient.most_common(3)
        )
        raise DataError(
            expected=f"at most {100 * share:.3g}% of images so far to fail for a time",
            got=f"{failed} failures of {done} ({reasons})",
            where=str(self.cache),
            fix="check the network and run again, or raise fetch_images.failed_share; fetched"
            " images stay in the cache",
        )


def _save_image(path: Path, body: bytes) -> None:
    """Save a body atomically if it decodes; a full disk is no failure of the URL."""
    check_first_bytes(body)
    with atomic_write(path) as temporary:
        temporary.write_bytes(body)
        try:
            encode(temporary, CHECKED_SIDE)
        except DataError as error:
            raise DownloadError("broken image", OK) from error


def _back_off(attempt: int) -> float:
    """Return the seconds to wait after an attempt, with jitter so that tasks do not synchronize."""
    return FIRST_WAIT * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5)  # noqa: S311  # no secret
