"""Encodes prompts as model inputs: chat template, token ids, pixel values. Needs no weights.

The chat template is the model's own. Nothing is truncated here, which could cut image tokens or the
answer: a prompt that is too long has its fields shortened before
(:func:`mllm_msr.method.prompts.fit`).
"""

import base64
import contextlib
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from mllm_msr.core.errors import ModelError, ParamsError, UserError
from mllm_msr.core.files import file_digest
from mllm_msr.engines.families import image_token_id
from mllm_msr.engines.processors import load_processor, takes_images
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery, ImageRef

# Some chat templates print today's date by default; a prompt must not change overnight. Templates
# see plain data only, no function, so the date of those that call one is set by a macro.
DATE = datetime.datetime(2024, 7, 26)
DATE_FORMATS = [*"aAbBcdeFHIjmMpSTxXyY", "-d", "-m"]  # as %d of strftime; others stay as they are
_FORMAT = "format" + "".join(
    f"|replace('%{form}', '{DATE.strftime(f'%{form}')}')" for form in DATE_FORMATS
)
FIXED = {  # by the name in a chat template: what is written before the template
    "date_string": f"{{% set date_string = '{DATE:%d %b %Y}' %}}\n",
    "strftime_now": f"{{% macro strftime_now(format) %}}{{{{ {_FORMAT} }}}}{{% endmacro %}}\n",
    "enable_thinking": "{% set enable_thinking = false %}\n",  # the answer is the first token
}
PROMPTS_CACHED = 10_000  # their tokens are needed several times: to count, plan and pack
IDENTIFYING_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
PROVENANCE = "import.json"  # where an imported model comes from; changes no response


class _Image(NamedTuple):
    """How images of one size are encoded.

    Attributes:
        tokens: The image's token ids, with those that the processor puts around and between them.
        grid: Time steps, rows and columns of patches, (1, 3); None in families without M-RoPE.
    """

    tokens: list[int]
    grid: torch.Tensor | None


class Encoder:
    """A model's processor and chat template, with the images of prompts.

    Attributes:
        name: Folder or hub name of the model.
        system_message: The system message of every prompt; None: what the chat template writes
            where a conversation has none.
        config: The model's configuration.
        revision: The commit of a hub model, resolved from the branch; None for a folder.
        takes_images: Whether the model takes images.
        tokenizer: The tokenizer; it pads on the left.
        chat_template: The chat template, in Jinja, with the date that it prints and thinking off.
        system_as_text: Whether a system message is a text in conversations, no list of parts.
        template_variables: What a server must set in its chat template to render the same.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        gallery: Gallery | None,
        system_message: str | None = None,
    ) -> None:
        """Load configuration and processor.

        Args:
            name: Folder or hub name of the model.
            revision: Branch, tag or commit of a hub model; None: the main branch.
            gallery: The images; None where no prompt has one.
            system_message: The system message of every prompt, which may be empty; None leaves it
                to the chat template.

        Raises:
            ModelError: There is no such model, a file of its processor is missing or broken, it has
                no chat template, its parts do not fit together, or there is a system message and
                the chat template has no place for one.
        """
        self.name, self._gallery, self.system_message = name, gallery, system_message
        self.config = load_config(name, revision)
        self.revision = find_commit(name, revision)
        self.takes_images = takes_images(self.config)
        with _model_errors("a tokenizer and processor", name):
            self._processor = load_processor(name, self.revision)
        self.tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._cached_tokens = functools.lru_cache(PROMPTS_CACHED)(self._tokenize)
        self._images: dict[tuple[int, int], _Image] = {}  # by size in pixels
        template = getattr(self._processor, "chat_template", None)
        if isinstance(template, Mapping):  # several by name, others for tools
            template = template.get("default")
        if not template:
            fix = "use an instruction-tuned model"
            raise ModelError(expected="a chat template", got="none", where=name, fix=fix)
        self.chat_template = "".join(FIXED[name] for name in FIXED if name in template) + template
        thinks = "enable_thinking" in template
        self.template_variables = {"enable_thinking": False} if thinks else {}
        self.system_as_text = not self.takes_images
        ids = [getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video")]
        placeholders = [self.tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None]
        self._placeholders = [str(text) for text in placeholders if text]
        with _model_errors("a processor and chat template that fit the model", name):
            if system_message is not None:
                self._check_system_role()
            self._check_processor()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what the encoder was opened with, for the workers of a cluster."""
        return Encoder, (self.name, self.revision, self._gallery, self.system_message)

    @functools.cached_property
    def identity(self) -> str:
        """The model's identity in response keys: hub commit, or SHA-256 of the folder's files.

        What changes prompts is part of it: the chat template, a system message, that thinking is
        off, and the fixed date of a template that would print another one.
        """
        identity, parts = self._model_identity(), []
        if self.system_message is not None:
            parts.append(self.system_message)
        if "strftime_now" in self.chat_template and "date_string" not in self.chat_template:
            parts.append(f"date {DATE:%Y-%m-%d}")
        if self.takes_images and self.system_as_text:
            parts.append("system message as text")
        if self.template_variables:
            parts.append(json.dumps(self.template_variables))
        for part in parts:
            identity = hashlib.sha256(f"{identity} {part}".encode()).hexdigest()
        return identity

    def _model_identity(self) -> str:
        folder = Path(self.name)
        if not folder.is_dir():
            return f"{self.name}@{self.revision}"
        files = sorted(file for pattern in IDENTIFYING_FILES for file in folder.glob(pattern))
        digests = " ".join(
            f"{file.name}:{file_digest(file)}" for file in files if file.name != PROVENANCE
        )
        return hashlib.sha256(digests.encode()).hexdigest()

    @property
    def context(self) -> int:
        """The context length: the most tokens of prompt and response together."""
        return int(self.config.get_text_config().max_position_embeddings)

    @property
    def image_token_id(self) -> int:
        """The id of the token that stands for a patch of an image."""
        return image_token_id(self.config)

    def render(self, prompt: Prompt, answer: str | None = None) -> str:
        """Render a prompt by the chat template, with one placeholder for the image.

        Args:
            prompt: The user's turn.
            answer: The assistant's turn; None leaves it open for the model.

        Raises:
            ModelError: The prompt has an image and the model takes none.
            ParamsError: A text of the prompt, or the system message, contains the model's image
                placeholder.
        """
        texts = (prompt.before, prompt.after, self.system_message or "")
        for placeholder in self._placeholders:
            if any(placeholder in text for text in texts):
                fix = "write {image} where the template shows the image, and nothing elsewhere"
                expected = f"a text without {placeholder}, which the model takes for an image"
                raise ParamsError(
                    expected=expected, got="one with it", where="prompts.yaml", fix=fix
                )
        if prompt.image and not self.takes_images:
            fix = "use a multimodal model here, or leave the image out"
            raise ModelError(
                expected="a model that takes images",
                got="a text-only model",
                where=self.name,
                fix=fix,
            )
        with _model_errors("a chat template for one turn", self.name):
            return self._apply_template(self.system_message, prompt, answer)

    def encode(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Encode a batch, padded on the left.

        Returns:
            The inputs of the model's forward: ``input_ids`` and ``attention_mask``, each
            (prompts, longest prompt); pixel values and image sizes in the family's own form.
        """
        texts = [self.render(prompt) for prompt in prompts]
        image_refs = [prompt.image for prompt in prompts if prompt.image]
        images = iter(self._gallery.images(image_refs) if self._gallery and image_refs else [])
        return self.process(texts, [[next(images)] if prompt.image else [] for prompt in prompts])

    def tokens(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a rendered prompt, with those of its image.

        They depend on the image's size only, not on its pixels. The list is cached: do not modify
        it.
        """
        return self._cached_tokens(prompt)

    def _tokenize(self, prompt: Prompt) -> list[int]:
        text = self.render(prompt)
        tokens = self._token_ids(text)
        if prompt.image and self._gallery:
            index = tokens.index(self.image_token_id)
            image = self._encode_image(self._gallery.size(prompt.image), text)
            tokens[index : index + 1] = image.tokens
        return tokens

    def count_tokens(self, prompt: Prompt) -> int:
        """Count the tokens of a rendered prompt, with those of its image."""
        return len(self.tokens(prompt))

    def grid(self, prompt: Prompt) -> torch.Tensor | None:
        """Return time steps, rows and columns of the image's patches, (1, 3).

        None without an image, and in families without M-RoPE.
        """
        if prompt.image is None or self._gallery is None:
            return None
        return self._encode_image(self._gallery.size(prompt.image), self.render(prompt)).grid

    def image_url(self, image_ref: ImageRef) -> str:
        """Return an image as a data URL, with the bytes of the table of images."""
        assert self._gallery, "a prompt with an image has a gallery"
        image = self._gallery.encoded(image_ref)
        kind = "webp" if image[8:12] == b"WEBP" else "jpeg"  # the two formats of the table
        return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"

    def pixels(self, image_refs: Sequence[ImageRef]) -> dict[str, torch.Tensor]:
        """Return the inputs of the vision tower: pixel values and sizes in the family's form."""
        images = self._gallery.images(image_refs) if self._gallery else []
        prepare = self._processor.image_processor
        inputs: Mapping[str, torch.Tensor] = prepare([[i] for i in images], return_tensors="pt")
        return dict(inputs)

    def answer_token_id(self, prompt: Prompt, answer: str) -> int:
        """Return the id of the token that an answer becomes after a prompt.

        The same word may be different tokens in other contexts (``yes`` and `` yes``).

        Raises:
            ModelError: The answer is not exactly one token there.
        """
        opened = self._token_ids(self.render(prompt))
        closed = self._token_ids(self.render(prompt, answer))
        token = closed[len(opened)] if len(closed) > len(opened) else None
        alone = token is not None and closed[: len(opened)] == opened
        if token is None or not alone or self.tokenizer.decode([token]).strip() != answer:
            got = self.tokenizer.convert_ids_to_tokens(closed[len(opened) - 1 :][:4])
            raise ModelError(
                expected=f"the answer {answer!r} to be one token after the prompt",
                got=f"the tokens {got}",
                where=self.name,
                fix="choose another wording in prompts.yaml, recommender.answer_yes and answer_no",
            )
        return token

    def _apply_template(self, system: str | None, prompt: Prompt, answer: str | None) -> str:
        """Render a conversation by the chat template; None leaves a message out."""
        turns: list[dict[str, Any]] = [{"role": "user", "content": self._content(prompt)}]
        if system is not None:
            parts = [{"type": "text", "text": system}]
            turns.insert(0, {"role": "system", "content": system if self.system_as_text else parts})
        if answer is not None:
            turns.append({"role": "assistant", "content": self._content(Prompt(answer))})
        return str(
            self._processor.apply_chat_template(
                turns,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=answer is None,
            )
        )

    def _check_system_role(self) -> None:
        """Choose the form of the system message: a text where the template needs one.

        Raises:
            ModelError: The chat template drops or refuses a system message in every form.
        """
        fault = self._find_system_fault()
        if fault and not self.system_as_text:
            self.system_as_text = True
            fault = self._find_system_fault()
        if fault:
            raise ModelError(
                expected="a chat template that shows a system message",
                got=fault,
                where=self.name,
                fix="set system_message to null",
            )

    def _find_system_fault(self) -> str | None:
        """Render a word as system message, and say what the chat template does wrong with it."""
        try:
            text = self._apply_template("instruction", Prompt("word"), None)
        except Exception as error:  # a template raises what it likes
            return f"{type(error).__name__}: {error}"
        if "instruction" not in text:
            return "one that drops it"
        is_list = re.search(r"""["']type["']\s*:\s*["']text["']""", text)
        return "one that prints it as a list" if is_list else None

    def _check_processor(self) -> None:
        """Encode a word and a small image, so that parts that do not match fail before any work.

        Raises:
            ModelError: The chat template drops the text or the image, or writes for the image what
                only the processor expands; or the tokenizer has more tokens than the model.
        """
        prompts = [Prompt("word")]
        if self.takes_images:
            prompts.append(Prompt("word", ImageRef("an image", ""), "word"))
        fix = "complete the model's folder, or name another model"
        for prompt in prompts:
            text = self.render(prompt)
            tokens, images = self._token_ids(text), int(prompt.image is not None)
            shown = tokens.count(self.image_token_id) if self.takes_images else images
            start = getattr(self.tokenizer, "boi_token", None)
            if images and not shown and start and start in text:
                raise ModelError(
                    expected="a chat template that writes the image's own token",
                    got=f"{start}, which only the processor expands",
                    where=self.name,
                    fix="use another family: Gemma 3 and others of this kind are not supported",
                )
            if "word" not in text or shown != images:
                got = "one that drops the text or the image"
                raise ModelError(
                    expected="a chat template that shows the prompt",
                    got=got,
                    where=self.name,
                    fix=fix,
                )
            size = int(self.config.get_text_config().vocab_size)
            if max(tokens) >= size:
                got = f"token {max(tokens):,}"
                raise ModelError(
                    expected=f"the tokenizer of {size:,} tokens",
                    got=got,
                    where=self.name,
                    fix=fix,
                )
            self.process([text], [[Image.new("RGB", (64, 64))] * images])

    def _content(self, prompt: Prompt) -> str | list[dict[str, str]]:
        """Return a turn's content: parts for multimodal models, a text for the others."""
        if not self.takes_images:
            return prompt.before
        parts = [
            {"type": "text", "text": prompt.before},
            {"type": "image"},
            {"type": "text", "text": prompt.after},
        ]
        return [part for part in parts if part.get("text") or (prompt.image and "text" not in part)]

    def _token_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=self._adds_start(text))["input_ids"])

    def _adds_start(self, text: str) -> bool:
        """Return whether the tokenizer must add the start token: the chat template has none."""
        start = self.tokenizer.bos_token
        return not (start and text.startswith(start))

    def _encode_image(self, size: tuple[int, int], text: str) -> _Image:
        """Return how images of a size are encoded.

        Args:
            size: Width and height in pixels.
            text: A rendered prompt with one image placeholder, which the image's tokens replace.
        """
        if size not in self._images:
            inputs = self.process([text], [[Image.new("RGB", size)]])
            with_image, without = inputs["input_ids"][0].tolist(), self._token_ids(text)
            index = without.index(self.image_token_id)
            tokens = with_image[index : len(with_image) - (len(without) - index - 1)]
            self._images[size] = _Image(tokens, inputs.get("image_grid_thw"))
        return self._images[size]

    def process(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        """Run the processor on rendered prompts.

        Args:
            texts: The rendered prompts.
            images: The images of each, one or none.
        """
        options: dict[str, Any] = {
            "padding": True,
            "return_tensors": "pt",
            "add_special_tokens": self._adds_start(texts[0]),
        }
        if any(images):
            options["images"] = images
        inputs: Mapping[str, torch.Tensor] = self._processor(text=texts, **options)
        return dict(inputs)


def find_commit(name: str, revision: str | None) -> str | None:
    """Resolve the branch of a hub model to a commit; None for a folder.

    Upstream: ``cached_file`` and ``extract_commit_hash`` of ``transformers.utils.hub``,
    transformers>=5.23,<6; loading a model does not report the commit.

    Raises:
        ModelError: The hub's cache has no commit.
    """
    if Path(name).is_dir():
        return None
    file = cached_file(name, "config.json", revision=revision or "main")
    commit: str | None = extract_commit_hash(file, None)
    if commit is None:
        fix = "download the model with huggingface_hub, or name its folder"
        raise ModelError(
            expected="a model in the hub's cache, with its commit",
            got=str(file),
            where=name,
            fix=fix,
        )
    return commit


def model_folder(encoder: Encoder) -> Path:
    """Return a model's folder; for a hub model that of its commit in the hub's cache."""
    folder = Path(encoder.name)
    if folder.is_dir():
        return folder
    return Path(cached_file(encoder.name, "config.json", revision=encoder.revision)).parent


def load_config(name: str, revision: str | None) -> PretrainedConfig:
    """Load a model's configuration; code from the hub is never run.

    Raises:
        ModelError: There is no such model, or its type is unknown to transformers.
    """
    # The hub has no such names; without this, transformers would ask it for one, five times.
    if not Path(name).is_dir() and name.startswith((".", "/", "~", "models/")):
        fix = "import the model (docs/models.md), or name its folder or a hub model"
        raise ModelError(expected="a model", got="no such folder", where=name, fix=fix)
    fix = "name a folder or a hub model that transformers knows without code of its own"
    with _model_errors("a model", name, fix):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


@contextlib.contextmanager
def _model_errors(
    expected: str, name: str, fix: str = "complete or replace the model's files"
) -> Iterator[None]:
    """Turn any error of the block into one line that names the model.

    Broken files raise all kinds of errors: tokenizers a bare ``Exception``, Jinja and JSON their
    own types, other code ``KeyError`` or ``TypeError``.

    Raises:
        ModelError: The block raised anything but a ``UserError``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ModelError(expected=expected, got=got, where=name, fix=fix) from error
