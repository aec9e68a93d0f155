"""Random-weight models with the shapes of well-known ones, to benchmark their speed.

    python -m bench.shapes llava-1.6-mistral-7b /tmp/llava
    python -m bench.models --model /tmp/llava --case scoring
    python -m bench.models --model /tmp/llava --case training --sequences 200 --batch-size 4
    python -m bench.shapes llama-3-8b /tmp/llama
    python -m bench.models --model /tmp/llama --case preferences

Speed does not depend on the weights' values. Tokenizer and chat template are the pocket model's, so
that the pipeline's prompts can be used; the number of image tokens is the real model's.
:class:`RandomModel` makes the weights on the device instead, without a file.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3VLConfig,
)

from mllm_msr.engines.local import LocalModel

POCKET = "mllm_msr/pocket/model"
LETTERS = 3  # of a whole word, at least
TILES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # pixels, of LLaVA-1.6
# Two narrow layers in place of all others, and few tokens, to run the code on a CPU.
TINY = {
    "vocab_size": 1_000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Layers = Annotated[int, typer.Option(help="Number of decoder layers.")]


@app.command("llava-1.6-mistral-7b")
def llava(folder: Path, layers: Layers = 32) -> None:
    """Write a model of LLaVA-1.6-Mistral-7B's shapes."""
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = special_ids(tokenizer) | {"image_token_id": image}
    config = llava_config(layers, ids=ids)
    save(LlavaNextForConditionalGeneration, config, llava_processor(tokenizer), folder)


@app.command("llama-3-8b")
def llama(folder: Path, layers: Layers = 32) -> None:
    """Write a model of Llama-3-8B's shapes."""
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    config = llama_config(layers, ids=special_ids(tokenizer))
    save(LlamaForCausalLM, config, tokenizer, folder)


def llava_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaNextProcessor:
    """Return a processor with LLaVA-1.6's image processing and another tokenizer."""
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 336},
            crop_size={"height": 336, "width": 336},
            image_grid_pinpoints=TILES,
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",  # noqa: S106  # a token of text
        chat_template=tokenizer.chat_template,
    )


def llava_config(
    layers: int = 32,
    changes: Mapping[str, int] | None = None,
    ids: Mapping[str, int] | None = None,
) -> LlavaNextConfig:
    """Return the configuration of LLaVA-1.6-Mistral-7B, with changed sizes of both its parts."""
    text = {
        "vocab_size": 32_064,
        "sliding_window": None,
        "rope_theta": 1e6,
        "num_hidden_layers": layers,
    }
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    changed = dict(changes or {})
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision | changed),
        text_config=MistralConfig(**text | changed),
        image_grid_pinpoints=TILES,
        **(ids or {}),
    )


def llama_config(
    layers: int = 32,
    changes: Mapping[str, int] | None = None,
    ids: Mapping[str, int] | None = None,
) -> LlamaConfig:
    """Return the configuration of Llama-3-8B, with changed sizes."""
    sizes = {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
    }
    return LlamaConfig(**sizes | dict(changes or {}), **(ids or {}))


def qwen_config() -> Qwen3VLConfig:
    """Return the configuration of Qwen3-VL-4B."""
    text = {
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of the padding and end-of-sequence tokens."""
    return {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}


def save(model_class: Any, config: Any, processor: Any, folder: Path) -> None:
    """Build a model in bfloat16 and save it in the format of a hub model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(model_class, config, device, torch.bfloat16)
    ids = {"pad_token_id": config.pad_token_id, "eos_token_id": config.eos_token_id}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(f"wrote {folder}: {weights:,} weights")


def save_without_weights(config: Any, processor: Any, folder: Path) -> None:
    """Save what :class:`RandomModel` needs: configuration and processor."""
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def build(
    construct: Callable[[Any], Any], config: Any, device: torch.device, dtype: torch.dtype
) -> Any:
    """Build a model with random weights on a device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return construct(config)
    finally:
        torch.set_default_dtype(before)


class RandomModel(LocalModel):
    """A model whose folder has no weights: they are drawn on its device.

    Each response consists of words and is as long as allowed, since the output layer's rows of all
    other tokens are zero: special tokens, parts of words, and those that the tokenizer lacks.
    """

    def load(self) -> PreTrainedModel:
        """Draw the weights anew."""
        family = AutoModelForImageTextToText if self.encoder.takes_images else AutoModelForCausalLM
        construct = partial(family.from_config, dtype=self.dtype)
        model = build(construct, self.encoder.config, self.device, self.dtype)
        model.set_attn_implementation("sdpa")
        tokenizer = self.encoder.tokenizer
        others = torch.ones(model.get_output_embeddings().out_features, dtype=torch.bool)
        others[tokenizer.convert_tokens_to_ids(whole_words(tokenizer))] = False
        with torch.no_grad():
            model.get_output_embeddings().weight[others.to(self.device)] = 0
        model.generation_config = GenerationConfig(**special_ids(tokenizer))
        return model


def whole_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that are a space and a word, in order."""
    start = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # a space in byte-level vocabularies
    return sorted(
        token
        for token in tokenizer.get_vocab()
        if token.startswith(start) and len(token) > LETTERS and token[1:].isascii()
        if token[1:].isalpha()
    )


if __name__ == "__main__":
    app()
