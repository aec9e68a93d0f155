"""From a prompt to what a model reads: chat template, tokens, pixels. Needs no weights.

The chat template is the model's own. Nothing is ever truncated here: a prompt that is too long is
shortened before, field by field (:func:`mllm_msr.method.prompts.fit`), so that neither image tokens
nor the answer can be cut.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from mllm_msr.core.errors import ModelError, ParamsError, UserError
from mllm_msr.core.files import file_digest
from mllm_msr.engines.processors import load_processor, takes_images
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery, ImageRef

# Some chat templates print today's date unless told another; a prompt must not change overnight.
DATE = {"date_string": "26 Jul 2024"}
PROMPTS_KEPT = 10_000  # whose tokens are not found anew by each who counts, plans or packs them
IDENTIFYING_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


class _Image(NamedTuple):
    """What an image of some size becomes in a prompt: its tokens, and its grid where it has one."""

    tokens: list[int]
    grid: torch.Tensor | None


class Encoder:
    """A model's processor and chat template, with the images that prompts may show.

    Attributes:
        name: Folder or hub name of the model.
        revision: The commit of a hub model, whatever branch was asked for; None for a folder.
        sees: Whether the model takes images.
        tokenizer: The tokenizer; it pads on the left.
    """

    def __init__(self, name: str, revision: str | None, gallery: Gallery | None) -> None:
        """Load configuration and processor.

        Raises:
            ModelError: There is no such model, a file of its processor is missing or broken, it has
                no chat template, or its parts do not fit together.
        """
        self.name, self._gallery = name, gallery
        self.config = load_config(name, revision)
        self.revision = find_commit(name, revision)
        self.sees = takes_images(self.config)
        with _usable("a tokenizer and processor", name):
            self._processor = load_processor(name, self.revision)
        self.tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._tokens = functools.lru_cache(PROMPTS_KEPT)(self._tokenize)
        self._images: dict[tuple[int, int], _Image] = {}
        template = getattr(self._processor, "chat_template", None)
        if not template:
            fix = "use an instruction-tuned model"
            raise ModelError(expected="a chat template", got="none", where=name, fix=fix)
        self._dated = DATE if "date_string" in str(template) else {}
        ids = [getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video")]
        marks = [self.tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None]
        self._marks = [str(mark) for mark in marks if mark]  # of images, as they stand in a text
        with _usable("a processor and chat template that fit the model", name):
            self._try_out()

    @functools.cached_property
    def identity(self) -> str:
        """What the model is: its hub commit, or the SHA-256 of its folder's files."""
        folder = Path(self.name)
        if not folder.is_dir():
            return f"{self.name}@{self.revision}"
        files = sorted(file for pattern in IDENTIFYING_FILES for file in folder.glob(pattern))
        digests = " ".join(f"{file.name}:{file_digest(file)}" for file in files)
        return hashlib.sha256(digests.encode()).hexdigest()

    @property
    def context(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return int(self.config.get_text_config().max_position_embeddings)

    def render(self, prompt: Prompt, answer: str | None = None) -> str:
        """Give the text as the model gets it, with one place holder for the image.

        Args:
            prompt: The user's turn.
            answer: The assistant's turn; None leaves it open for the model.

        Raises:
            ModelError: The prompt shows an image and the model takes none.
            ParamsError: A text of the prompt has the model's own mark of an image.
        """
        for mark in self._marks:
            if mark in prompt.before or mark in prompt.after:
                fix = "write {image} where the template shows the image, and nothing elsewhere"
                expected = f"a text without {mark}, which the model takes for an image"
                raise ParamsError(
                    expected=expected, got="one with it", where="prompts.yaml", fix=fix
                )
        if prompt.image and not self.sees:
            fix = "use a multimodal model here, or leave the image out"
            raise ModelError(
                expected="a model that takes images",
                got="a text-only model",
                where=self.name,
                fix=fix,
            )
        turns = [{"role": "user", "content": self._content(prompt)}]
        if answer is not None:
            turns.append({"role": "assistant", "content": self._content(Prompt(answer))})
        with _usable("a chat template for one turn", self.name):
            return str(
                self._processor.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=answer is None, **self._dated
                )
            )

    def encode(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Encode a batch, padded on the left.

        Returns:
            What the model's forward takes: ``input_ids`` and ``attention_mask`` of shape
            (prompts, longest length), pixel values and sizes as the model family has them.
        """
        texts = [self.render(prompt) for prompt in prompts]
        image_refs = [prompt.image for prompt in prompts if prompt.image]
        found = iter(self._gallery.images(image_refs) if self._gallery and image_refs else [])
        return self.process(texts, [[next(found)] if prompt.image else [] for prompt in prompts])

    def tokens(self, prompt: Prompt) -> list[int]:
        """Give a prompt's tokens as the model gets them, those of the image included.

        They do not depend on the image's pixels, only on its size. The list is kept for the next
        who asks, and is not to be changed.
        """
        return self._tokens(prompt)

    def _tokenize(self, prompt: Prompt) -> list[int]:
        text = self.render(prompt)
        tokens = self._token_ids(text)
        if prompt.image and self._gallery:
            place = tokens.index(self._image_token)
            tokens[place : place + 1] = self._lay_out(self._gallery.size(prompt.image), text).tokens
        return tokens

    def count(self, prompt: Prompt) -> int:
        """Count a prompt's tokens as the model gets them, those of the image included."""
        return len(self.tokens(prompt))

    def grid(self, prompt: Prompt) -> torch.Tensor | None:
        """Give time, rows and columns of a prompt's image, (1, 3), in families that place by it."""
        if prompt.image is None or self._gallery is None:
            return None
        return self._lay_out(self._gallery.size(prompt.image), self.render(prompt)).grid

    def pixels(self, image_refs: Sequence[ImageRef]) -> dict[str, torch.Tensor]:
        """Give what the vision tower takes of images: pixel values, sizes, as it has them."""
        images = self._gallery.images(image_refs) if self._gallery else []
        prepare = self._processor.image_processor
        inputs: Mapping[str, torch.Tensor] = prepare([[i] for i in images], return_tensors="pt")
        return dict(inputs)

    def answer_token(self, prompt: Prompt, answer: str) -> int:
        """Find the token that an answer is, where the model would give it.

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

    def _try_out(self) -> None:
        """Encode a word and a small image, so that parts that do not fit show before any work.

        Raises:
            ModelError: The chat template drops the text or the image, or the tokenizer has more
                tokens than the model.
        """
        shown = [Prompt("word")]
        if self.sees:
            shown.append(Prompt("word", ImageRef("an image", ""), "word"))
        fix = "complete the model's folder, or name another model"
        for prompt in shown:
            text = self.render(prompt)
            tokens, images = self._token_ids(text), int(prompt.image is not None)
            if "word" not in text or (self.sees and tokens.count(self._image_token) != images):
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

    @property
    def _image_token(self) -> int:
        return int(self.config.image_token_id)

    def _content(self, prompt: Prompt) -> str | list[dict[str, str]]:
        """Give a turn's content: parts for multimodal models, a text for the others."""
        if not self.sees:
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
        """Tell whether the tokenizer must add what the chat template has not."""
        start = self.tokenizer.bos_token
        return not (start and text.startswith(start))

    def _lay_out(self, size: tuple[int, int], text: str) -> _Image:
        """Find what an image of a size becomes, in place of a text's one token for it."""
        if size not in self._images:
            inputs = self.process([text], [[Image.new("RGB", size)]])
            shown, alone = inputs["input_ids"][0].tolist(), self._token_ids(text)
            place = alone.index(self._image_token)
            tokens = shown[place : len(shown) - (len(alone) - place - 1)]
            self._images[size] = _Image(tokens, inputs.get("image_grid_thw"))
        return self._images[size]

    def process(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        """Run the processor on texts and the images of each, one or none."""
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
    """Find the commit that a hub model's branch stands for now; None for a folder.

    Raises:
        ModelError: The hub's files do not say.
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


def load_config(name: str, revision: str | None) -> PretrainedConfig:
    """Load a model's configuration; code from the hub is never run.

    Raises:
        ModelError: There is no such model, or its kind is unknown to transformers.
    """
    fix = "name a folder or a hub model that transformers knows without code of its own"
    with _usable("a model", name, fix):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


@contextlib.contextmanager
def _usable(
    expected: str, name: str, fix: str = "complete or replace the model's files"
) -> Iterator[None]:
    """Say in one line which part of a model cannot be used.

    What reads a broken file raises whatever it meets there: tokenizers a bare ``Exception``, Jinja
    and JSON their own, and other code a ``KeyError`` or ``TypeError``.

    Raises:
        ModelError: The block raised any other error than one for people.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ModelError(expected=expected, got=got, where=name, fix=fix) from error
