"""Models behind an OpenAI-compatible server (vLLM, SGLang, TGI, ``transformers serve``).

The setting ``engine: server`` of a model's section puts its prompts to a server instead of weights
in this process. The model's folder or hub name is still read for tokenizer and chat template, by
which prompts are counted and shortened. Address and key are those of a machine, so they come from
the environment, and are in no artifact:

- ``MLLM_MSR_SERVER``: the address with the API's version, ``http://127.0.0.1:8000/v1``; a section's
  own, such as ``MLLM_MSR_SERVER_RECOMMENDER``, has precedence;
- ``MLLM_MSR_SERVER_KEY``: the key, where the server wants one;
- ``MLLM_MSR_SERVER_REQUESTS``: how many requests may be under way at once;
- ``MLLM_MSR_SERVER_LOGPROBS``: among how many of the most likely tokens yes and no are looked for.

Requests that fail for a reason that may pass (no connection, time-out, 408, 409, 429, 5xx, a reply
that is no JSON) are repeated with growing, jittered pauses, or as ``Retry-After`` says. A server
that is away or too busy is waited for.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from mllm_msr.core.errors import ModelError, ParamsError, install_command, shorten
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import Response, StepOutput
from mllm_msr.images.gallery import ImageRef

if TYPE_CHECKING:
    import openai

log = logging.getLogger(__name__)

ADDRESS, KEY = "MLLM_MSR_SERVER", "MLLM_MSR_SERVER_KEY"
REQUESTS, LOGPROBS = "MLLM_MSR_SERVER_REQUESTS", "MLLM_MSR_SERVER_LOGPROBS"
DEFAULT_REQUESTS = 64
PROMPTS_PER_BATCH = 4_096  # after which the store is asked again for what others computed
SECONDS_PER_REQUEST = 600  # one that waits in a long queue too
REPETITIONS = 6  # of a request by the client, in some 20 seconds; then it fails, unless it may pass
PATIENCE = 600  # seconds that a server may be away or too busy before it is an error
PAUSE = 5  # seconds before the client tries again
SMALLEST = 1e-45  # probability of an answer; the least positive number in float32
BUSY = (408, 409, 429, 502, 503, 504)
DEFAULT_LOGPROBS, MOST_LOGPROBS = 20, 100_000  # vLLM and OpenAI return 20 by default
DECISIONS = "/systemone"  # the endpoint of `transformers serve` that answers with probabilities
ORIGIN = ("model", "system_fingerprint")  # what a reply says of the model that made it
PROBE = Prompt("word")
BROKEN_REPLIES = 5  # in a row to one request, after which it is an error
MOST_REQUESTS = 4_096


class ServerModel:
    """A model behind a server.

    Attributes:
        encoder: Tokenizer and chat template of the model that is served.
        budget: None: memory is the server's own concern.
        precision: Of the computation, as far as it is known here.
    """

    budget = None
    precision = "server"

    def __init__(self, encoder: Encoder, section: str) -> None:
        """Take a section's server; nothing is asked yet.

        Args:
            encoder: Tokenizer and chat template of the model that is served.
            section: The section of the settings, which may have an address of its own.

        Raises:
            ParamsError: No address is set, or another variable is no positive number.
            ModelError: The package openai is missing.
        """
        self.encoder, self._section = encoder, section
        self._address = find_address(section)
        self._requests = read_number(REQUESTS, DEFAULT_REQUESTS, MOST_REQUESTS)
        self._logprobs = read_number(LOGPROBS, DEFAULT_LOGPROBS, MOST_LOGPROBS)
        self._client = open_client(self._address)
        self._origin: Mapping[str, str | None] | None = None  # of the first reply
        self._is_interrupted = False  # by Ctrl-C: no request is sent again
        self._reading = threading.Lock()  # a gallery serves one thread at a time

    @cached_property
    def identity(self) -> str:
        """The model's identity in response keys: what the server says of itself.

        Asks for one token, so that a server that is not there, refuses the key or has another chat
        template is an error before any work.

        Raises:
            ModelError: The server cannot be used, or counts other tokens for a prompt.
        """
        with self._of_known_form():
            counted = self._chat(PROBE, max_tokens=1)["usage"]["prompt_tokens"]
        expected = self.encoder.count_tokens(PROBE)
        if counted != expected:
            raise self._error(
                f"a server with the chat template of {self.encoder.name} ({expected} tokens)",
                f"{counted} tokens for the same prompt",
                f"serve this model, or correct {self._section}.model",
            )
        assert self._origin, "set by the reply"
        origin = {
            "engine": "server",
            "root": self._served.get("root"),  # the folder or repository behind a name
            "system_message": self.encoder.system_message,
            **self._origin,
            **self._template_variables,
        }
        return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()

    def batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Group prompts into large batches, in their order; the server makes its own."""
        for start in range(0, len(prompts), PROMPTS_PER_BATCH):
            yield list(range(start, min(start + PROMPTS_PER_BATCH, len(prompts))))

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[StepOutput]:
        """Yield the greedy responses to prompts as they arrive.

        Raises:
            ModelError: The server refuses a prompt, is away for too long, or serves another model
                than at the start.
        """

        def ask(prompt: Prompt) -> tuple[Response, int]:
            reply = self._chat(prompt, max_tokens=max_new_tokens)
            with self._of_known_form():
                choice, tokens = reply["choices"][0], int(reply["usage"]["completion_tokens"])
                text = choice["message"]["content"] or ""
                text = text.encode(errors="replace").decode()  # JSON may have half a character
            return Response(text.strip(), choice["finish_reason"] == "stop"), tokens

        yield from self._ask_all(ask, prompts)

    def score(
        self, prompts: Sequence[Prompt], answer_token_ids: tuple[int, int]
    ) -> Iterator[StepOutput]:
        """Yield the log-odds of yes against no as they arrive, as texts for the response store.

        Args:
            prompts: They end where the answer begins.
            answer_token_ids: Of yes and no.

        Raises:
            ModelError: As :meth:`generate`; or the server does not return both probabilities.
        """
        answers = [self.encoder.tokenizer.decode([token]) for token in answer_token_ids]
        read = self._decide if self._has_decisions else self._read_logprobs

        def ask(prompt: Prompt) -> tuple[Response, int]:
            yes, no = read(prompt, answers)
            return Response(repr(yes - no), complete=True), 0

        yield from self._ask_all(ask, prompts)

    def _ask_all(
        self, ask: Callable[[Prompt], tuple[Response, int]], prompts: Sequence[Prompt]
    ) -> Iterator[StepOutput]:
        """Put prompts to the server, several at once; yield responses as they arrive.

        After an error or Ctrl-C the requests under way are waited for, since their responses are
        paid for.
        """
        failed: BaseException | None = None
        with ThreadPoolExecutor(self._requests) as pool:
            futures = {pool.submit(ask, prompt): index for index, prompt in enumerate(prompts)}
            try:
                for future in as_completed(list(futures)):
                    if future.exception():
                        break
                    response, tokens = future.result()
                    yield StepOutput({futures.pop(future): response}, tokens)
            except KeyboardInterrupt as interrupt:
                failed, self._is_interrupted = interrupt, True
                log.warning("waiting for the requests under way; Ctrl-C again drops them")
            finally:
                pool.shutdown(cancel_futures=True)  # waits for those under way
        for future, index in futures.items():
            if future.cancelled():
                continue
            if error := future.exception():
                failed = failed or error
                continue
            response, tokens = future.result()
            yield StepOutput({index: response}, tokens)
        if failed:
            raise failed

    def _chat(self, prompt: Prompt, **options: Any) -> dict[str, Any]:
        """Ask for a completion; refuse the reply of another model than the first.

        Raises:
            ModelError: The server fails for good, or its model is another one.
        """
        body = self._named | {"messages": self._messages(prompt), "temperature": 0}
        reply = self._post("/chat/completions", body | self._template_variables | options)
        origin = {name: reply.get(name) for name in ORIGIN}
        self._origin = self._origin or origin
        if origin != self._origin:
            raise self._error(
                f"one model during the run, {_join(self._origin)}",
                f"a reply of {_join(origin)}",
                "run again when the server has one model; responses so far are kept",
            )
        return reply

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        self.encoder.render(prompt)  # refuses an image for a text-only model, and placeholders
        content: str | list[dict[str, Any]] = prompt.before
        if prompt.image:
            url = self._image_url(prompt.image)
            content = [
                {"type": "text", "text": prompt.before},
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": prompt.after},
            ]
            content = [part for part in content if part.get("text", "") or "image_url" in part]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.encoder.system_message is not None:
            messages.insert(0, {"role": "system", "content": self.encoder.system_message})
        return messages

    def _image_url(self, image_ref: ImageRef) -> str:
        with self._reading:
            return self.encoder.image_url(image_ref)

    def _read_logprobs(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Return the log-probabilities of the answers as the first token of a response.

        Raises:
            ModelError: They are not among those that the server returns.
        """
        reply = self._chat(prompt, max_tokens=1, logprobs=True, top_logprobs=self._logprobs)
        found: dict[str, float] = {}
        with self._of_known_form():
            listed = (reply["choices"][0].get("logprobs") or {}).get("content") or [{}]
            for token in listed[0].get("top_logprobs") or []:  # the most likely first
                found.setdefault(token["token"], float(token["logprob"]))
        missing = [answer for answer in answers if answer not in found]
        if missing:
            raise self._error(
                f"log-probabilities of {' and '.join(map(repr, answers))}",
                f"{len(found)} others, {', '.join(map(repr, list(found)[:3]))}"
                if found
                else "none",
                f"raise {LOGPROBS} ({self._logprobs}) and the server's limit (vLLM:"
                " --max-logprobs), or fine-tune the model for these answers",
            )
        return [found[answer] for answer in answers]

    def _decide(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Return the log-probabilities of the answers by the decisions of ``transformers serve``.

        Its model folder must have ``decision.json`` and ``decision_template.jinja``, which
        ``mllm-msr export --merged`` writes; without them the prompt would be another one.
        """
        state, assets = prompt.before, {}
        if prompt.image:
            placeholder = f"[image {prompt.image.digest}]"
            state = f"{prompt.before}{placeholder}{prompt.after}"
            head, _, data = self._image_url(prompt.image).partition(";base64,")
            form = head.removeprefix("data:image/")
            assets[placeholder] = {"type": "image", "format": form, "data_base64": data}
        question = {"type": "choice", "criteria": dict.fromkeys(answers)}
        body = self._named | {"state": state, "questions": {"answer": question}, "assets": assets}
        reply = self._post(DECISIONS, body)
        with self._of_known_form():
            probabilities = reply["answers"]["answer"]["probabilities"]
            return [math.log(max(probabilities[answer], SMALLEST)) for answer in answers]

    @cached_property
    def _served(self) -> Mapping[str, Any]:
        """What the server's list of models says of this one; nothing where it has no such list.

        Raises:
            ModelError: It serves several models, and none of this name.
        """
        try:
            listed = self._get("/models")["data"]
            models = {str(model["id"]): model for model in listed}
        except (ModelError, KeyError, TypeError):  # `transformers serve` lists the hub's cache only
            return {}
        if self.encoder.name in models:
            return dict(models[self.encoder.name])
        if len(models) > 1:
            raise self._error(
                self.encoder.name,
                f"a server of {', '.join(sorted(models)[:5])}",
                f"serve it under this name, or correct {self._section}.model",
            )
        return dict(next(iter(models.values()), {}))

    @property
    def _template_variables(self) -> dict[str, Any]:
        """What the server's chat template must set; nothing for most models."""
        variables = self.encoder.template_variables
        return {"chat_template_kwargs": variables} if variables else {}

    @property
    def _named(self) -> dict[str, Any]:
        """The name of the model in requests; none where the server does not list any."""
        return {"model": self._served["id"]} if self._served else {}

    @cached_property
    def _has_decisions(self) -> bool:
        """Whether the server describes the endpoint of decisions."""
        try:
            described = self._get(f"{self._address.removesuffix('/v1')}/openapi.json")
        except ModelError:
            return False
        return any(str(path).endswith(DECISIONS) for path in described.get("paths") or ())

    def _get(self, path: str) -> dict[str, Any]:
        """Return a reply to GET, of what a server may lack: a failure is repeated twice only.

        Raises:
            ModelError: There is none.
        """
        client = self._client.with_options(max_retries=2)
        return self._request(partial(client.get, path, cast_to=object))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return a reply to POST.

        Raises:
            ModelError: There is none.
        """
        return self._request(partial(self._client.post, path, body=dict(body), cast_to=object))

    def _request(self, send: Callable[[], Any]) -> dict[str, Any]:
        """Send a request, again and again where the reason of a failure may pass.

        Raises:
            ModelError: The server refuses the request, fails at it repeatedly, or is away for long.
        """
        import openai

        end, broken = time.monotonic() + PATIENCE, 0
        while True:
            try:
                reply = send()
            except openai.APIStatusError as error:
                got = f"status {error.status_code}, {error.response.text}"
                fix = "look at the server's log; responses so far are kept"
                if error.status_code in (401, 403):
                    fix = f"set {KEY} to the server's key"
                failure, may_pass = ("a reply", got, fix), error.status_code in BUSY
            except openai.APIConnectionError as error:
                got = f"{error} {error.__cause__ or ''}"
                fix = f"start the server, or correct {ADDRESS}; responses so far are kept"
                failure, may_pass = ("a server that replies", got, fix), True
            except ValueError as error:  # no JSON
                fix = "look for a proxy before the server; responses so far are kept"
                broken += 1
                failure, may_pass = ("a reply in JSON", str(error), fix), broken < BROKEN_REPLIES
            else:
                if isinstance(reply, dict):
                    return reply
                failure, may_pass = ("a reply in JSON", repr(reply), "correct the address"), False
            if not may_pass or self._is_interrupted or time.monotonic() > end:
                raise self._error(*failure)
            log.warning("%s; trying again", self._error(*failure))
            time.sleep(PAUSE * random.uniform(0.5, 1.5))  # noqa: S311  # not all at once

    @contextlib.contextmanager
    def _of_known_form(self) -> Iterator[None]:
        """Turn an error of reading a reply into one line.

        Raises:
            ModelError: A part of the reply is missing or of another type.
        """
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            got = f"another one ({type(error).__name__}: {error})"
            fix = f"correct {ADDRESS}: it ends with the API's version, /v1"
            raise self._error("a reply in the form of OpenAI's", got, fix) from error

    def _error(self, expected: str, got: str, fix: str) -> ModelError:
        """Return an error about the server; no message has the key."""
        key = os.environ.get(KEY)
        texts = [text.replace(key, "…") if key else text for text in (expected, shorten(got), fix)]
        return ModelError(expected=texts[0], got=texts[1], where=self._address, fix=texts[2])


def find_address(section: str) -> str:
    """Return the address of a section's server, without a slash at its end.

    Raises:
        ParamsError: There is none.
    """
    own = f"{ADDRESS}_{section.upper()}"
    address = os.environ.get(own) or os.environ.get(ADDRESS)
    if not address or not address.startswith(("http://", "https://")):
        raise ParamsError(
            expected="the address of a server, such as http://127.0.0.1:8000/v1",
            got=address or "none",
            where=f"{own} or {ADDRESS}, for {section}.engine: server",
            fix="set the environment variable, or set engine to local",
        )
    return address.rstrip("/")


def read_number(variable: str, default: int, most: int) -> int:
    """Return the positive number of an environment variable.

    Raises:
        ParamsError: It is none, or above ``most``.
    """
    text = os.environ.get(variable, str(default))
    if not (text.isdecimal() and 1 <= int(text) <= most):
        raise ParamsError(
            expected=f"a number from 1 to {most:,}",
            got=repr(text),
            where=variable,
            fix="correct the environment variable",
        )
    return int(text)


def open_client(address: str) -> "openai.OpenAI":
    """Return a client of a server.

    Raises:
        ModelError: The package openai is missing.
    """
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ModelError(
            expected="the package openai",
            got="none",
            where="engine: server",
            fix=install_command("server"),
        ) from error
    return openai.OpenAI(
        base_url=address,
        api_key=os.environ.get(KEY) or "none",  # a server without a key ignores it
        max_retries=REPETITIONS,
        timeout=SECONDS_PER_REQUEST,
    )


def _join(origin: Mapping[str, str | None]) -> str:
    return " ".join(str(value) for value in origin.values() if value)
