"""Images from the web: each URL is fetched once, checked, and kept whole.

What was fetched lies outside the pipeline's outputs, so that a killed run goes on where it was and
the next one asks only for what failed. A body is kept only if it decodes.
"""

import asyncio
import hashlib
import os
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

from mllm_msr.core.errors import DataError, shorten
from mllm_msr.core.files import atomic_write
from mllm_msr.fetching.downloading import (
    OK,
    DownloadError,
    check_beginning,
    download,
    find_host,
    open_session,
)
from mllm_msr.images.decoding import OR_ELSE, Failures, Located, encode

FIRST_WAIT = 1.0  # seconds before the second attempt; each further wait is twice as long
LONGEST_WAIT = 60.0  # also for a server that asks for more
# Judged earlier, a threshold would stop runs by bad luck.
FAILURES_BEFORE_JUDGED = 20
# An image that is only checked need not be large.
CHECKED_SIDE = 16


@dataclass(frozen=True)
class FetchOptions:
    """How images are fetched.

    Attributes:
        concurrency: Most connections at once; as many bodies are held in memory.
        per_host: Most connections to one host at once.
        timeout: Seconds for one attempt, from the name's look-up to the last byte.
        connect_timeout: Seconds for one address to accept a connection.
        attempts: Most attempts for one URL; in each, aiohttp may ask a second time where a
            connection breaks before an answer.
        max_bytes: Most bytes of an image.
        max_failed_share: Share of failed URLs above which fetching stops.
        allow_private: Whether addresses that are not public may be connected to.
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
class Fetched:
    """What became of a URL.

    Attributes:
        path: The kept file, byte by byte as it came; None where fetching failed.
        reason: Why it failed, in a word or two to count by; None where it did not.
        status: The last HTTP status, where a server answered in this run.
        attempts: Attempts made in this run; 0 for what was kept before.
    """

    path: Path | None
    reason: str | None = None
    status: int | None = None
    attempts: int = 0


def fetch(
    urls: Iterable[str],
    kept: Path,
    options: FetchOptions,
    results: dict[str, Fetched] | None = None,
) -> dict[str, Fetched]:
    """Fetch images that are not kept yet, and keep them.

    Failures are not remembered: the next call tries them again.

    Args:
        urls: Absolute http or https URLs; equal ones are fetched once.
        kept: The folder of what was fetched, now and by earlier runs.
        options: Limits.
        results: Takes what became of each URL as soon as that is known, for a caller that wants it
            even where fetching stops.

    Returns:
        What became of each URL, in the order of their first appearance.

    Raises:
        DataError: More than ``max_failed_share`` of the URLs so far failed, those that were kept
            before counting as good, or the disk is full; what was fetched until then is kept.
    """
    unique = list(dict.fromkeys(urls))
    results = {} if results is None else results
    results |= {url: Fetched(path) for url in unique if (path := kept_path(kept, url)).is_file()}
    missing = [url for url in unique if url not in results]
    bar: tqdm[NoReturn] = tqdm(
        None, "fetched", len(unique), initial=len(results), disable=not unique
    )
    with bar, warnings.catch_warnings():
        # Pillow's own warning would come on top of our refusal.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        asyncio.run(_fetch_all(missing, kept, options, results, bar))
    return {url: results[url] for url in unique}


def locate(
    images: Iterable[Mapping[str, str]],
    kept: Path,
    options: FetchOptions,
    failures: Failures,
    raw: Path,
) -> list[Located]:
    """Say in which file each image lies, once those on the web are fetched.

    Args:
        images: Rows of the table Images.
        kept: As :func:`fetch`.
        options: As :func:`fetch`.
        failures: Notes what cannot be fetched.
        raw: The folder of the raw files; no link among them may lead out of it.

    Raises:
        DataError: Too many failed, or the disk is full; what was fetched is kept, and what failed
            until then is noted.
    """
    rows = list(images)
    fetched: dict[str, Fetched] = {}
    try:
        fetch([row["url"] for row in rows if row["url"]], kept, options, fetched)
    except DataError:
        for row in rows:
            if row["url"] in fetched and fetched[row["url"]].reason:
                failures.note(row["item"], _explain(row["url"], fetched[row["url"]]))
        raise
    located = []
    for row in rows:
        if not row["url"]:
            located.append(Located(row["item"], Path(row["file"]), row["member"], raw))
        elif path := fetched[row["url"]].path:
            located.append(Located(row["item"], path))
        else:
            failures.add(row["item"], _explain(row["url"], fetched[row["url"]]))
    return located


def _explain(url: str, fetched: Fetched) -> DataError:
    """Say for people why an image could not be fetched."""
    times = "once" if fetched.attempts == 1 else f"{fetched.attempts} times"
    got = f"{fetched.reason}, tried {times}"
    return DataError(
        expected="an image", got=got, where=shorten(url), fix=f"correct its URL, {OR_ELSE}"
    )


def kept_path(kept: Path, url: str) -> Path:
    """Give the file in which a URL's bytes are kept, once they are."""
    digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    return kept / digest[:2] / digest[2:4] / digest


async def _fetch_all(
    urls: Sequence[str],
    kept: Path,
    options: FetchOptions,
    results: dict[str, Fetched],
    bar: "tqdm[NoReturn]",
) -> None:
    """Fetch from all hosts at once, so that a slow one does not hold up the others."""
    hosts: defaultdict[str, list[str]] = defaultdict(list)
    for url in urls:
        hosts[find_host(url)].append(url)
    # Not asyncio's own threads: looking up names needs them.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        async with open_session(
            options.concurrency, options.per_host, options.connect_timeout, options.allow_private
        ) as session:
            slots = asyncio.Semaphore(options.concurrency)
            fetcher = _Fetcher(session, pool, kept, options, results, bar, slots)
            try:
                async with asyncio.TaskGroup() as group:
                    for some in hosts.values():
                        queue = iter(some)
                        for _ in range(min(options.per_host, len(some))):
                            group.create_task(fetcher.work(queue))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # the others only came at the same time


@dataclass
class _Fetcher:
    """What the workers of a run share."""

    session: aiohttp.ClientSession
    pool: ThreadPoolExecutor
    kept: Path
    options: FetchOptions
    results: dict[str, Fetched]
    bar: "tqdm[NoReturn]"
    slots: asyncio.Semaphore
    failed: Counter[str] = field(default_factory=Counter)

    async def work(self, urls: Iterator[str]) -> None:
        """Fetch one URL after another from an iterator that other workers draw from too."""
        for url in urls:
            fetched = await self.fetch(url)
            self.results[url] = fetched
            self.bar.update()
            if fetched.reason:
                self.failed[fetched.reason] += 1
                self.judge()

    async def fetch(self, url: str) -> Fetched:
        """Try a URL until it is kept, or nothing more can be hoped for."""
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self.slots:  # until it is kept: a body waits in memory
                    options = self.options
                    body = await download(self.session, url, options.timeout, options.max_bytes)
                    path = await self.keep(url, body)
                return Fetched(path, None, OK, attempt)
            except DownloadError as error:
                if not error.passes or attempt >= self.options.attempts:
                    return Fetched(None, error.reason, error.status, attempt)
                pause = max(error.wait, _back_off(attempt))
            await asyncio.sleep(min(pause, LONGEST_WAIT))

    async def keep(self, url: str, body: bytes) -> Path:
        """Check and write a body in a thread: decoding takes time."""
        path = kept_path(self.kept, url)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.pool, _keep, path, body)
        return path

    def judge(self) -> None:
        """Stop where too many fail.

        What was kept before counts: the URLs left for a second run are those that failed in the
        first, and all of them may fail again.

        Raises:
            DataError: Too many failed.
        """
        failed, done = self.failed.total(), len(self.results)
        if failed < FAILURES_BEFORE_JUDGED or failed <= self.options.max_failed_share * done:
            return
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.failed.most_common(3))
        raise DataError(
            expected=f"at most {self.options.max_failed_share:.0%} of images to fail",
            got=f"{failed} failures of {done} ({reasons})",
            where=str(self.kept),
            fix="check the network and the URLs, or allow more; what was fetched is kept",
        )


def _keep(path: Path, body: bytes) -> None:
    """Write a body that decodes; a full disk is no failure of the URL and stops the run."""
    check_beginning(body)
    with atomic_write(path) as temporary:
        temporary.write_bytes(body)
        try:
            encode(temporary, CHECKED_SIDE)
        except DataError as error:
            raise DownloadError("broken image", OK) from error


def _back_off(attempt: int) -> float:
    """Give the seconds to wait after an attempt, spread so that workers do not come together."""
    return FIRST_WAIT * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5)  # noqa: S311  # no secret
