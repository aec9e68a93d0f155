"""Small models with random weights of every model family, with the files of a hub checkout.

Each is built from transformers' own configuration classes, with a tokenizer trained here, the
family's special tokens, padding side and chat template, and the files of a real checkout
(``config.json``, ``preprocessor_config.json``, ``video_preprocessor_config.json``,
``chat_template.jinja``, safetensors). Families differ in the number of tokens per image, in where
the start token comes from, and in how an answer is tokenised.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

SEED = 20
HIDDEN = 64
WINDOW = 16  # tokens of a sliding window

CORPUS = [
    "Describe the image. What is shown in this image? The cover shows a red flower on a beach.",
    "Title: summer dance music video. Summary of the item, its series and its maker.",
    "The user likes bright colours, cooking, cats and travel. The user's preference has moved.",
    "Based on the previous interaction history, will the user like this item? Answer yes or no.",
    "user assistant system User Assistant USER ASSISTANT You are a helpful assistant.",
    "[INST] Describe. [/INST] [INST] Summary: 123. [/INST]",
    *["yes", "no", "Yes", "No", "answer: yes", "answer: no", "Answer: Yes", "Answer: No"] * 9,
    *["\n\n"] * 9,
]

# The pre-tokenization of Qwen and Llama 3: line ends are not merged with the following text.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """A saved model of one family.

    Attributes:
        name: Short name of the family, used in test ids.
        folder: Folder of the saved model.
        has_images: False for the text-only model.
    """

    name: str
    folder: Path
    has_images: bool


def build_family(name: str, folder: Path) -> Family:
    """Build one family's model with seeded weights and save it.

    Args:
        name: One of ``FAMILIES``, ``WINDOWED`` or ``OTHER``.
        folder: Folder to write, which need not exist.

    Returns:
        The saved family.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    (FAMILIES | WINDOWED | OTHER)[name](folder)
    return Family(
        name=name, folder=folder, has_images=(folder / "preprocessor_config.json").exists()
    )


def draw_image(width: int, height: int, seed: int) -> Image.Image:
    """Return an RGB image of random pixels that depend only on the arguments."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def user_turn(text: str, has_image: bool) -> list[dict[str, Any]]:
    """Return a conversation of one user message, the image first."""
    image = [{"type": "image"}] if has_image else []
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]


# -- tokenizers ------------------------------------------------------------------------------------


def train_byte_tokenizer(special: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer, as of Qwen, SmolVLM and Llama 3; it encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 250,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    _add_special_tokens(tokenizer, special)
    return tokenizer


def train_sentencepiece_tokenizer(special: list[str]) -> Tokenizer:
    """Train a BPE tokenizer with byte fallback and a leading space (Llama 2, Mistral)."""
    control = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=control, show_progress=False)
    draft.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(draft.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(
        models.BPE(learnt["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _add_special_tokens(tokenizer, ["<unk>", "<s>", "</s>", *special])
    _prepend_token(tokenizer, "<s>")
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, special: list[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])


def _prepend_token(tokenizer: Tokenizer, token: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )


# -- chat templates, in the wording of each family -------------------------------------------------

# LLaVA's templates put every image before the text, and a space before the assistant's text.
PARTS_IMAGE_FIRST = """
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}
    {{- '<image>\n' }}
{%- endfor %}"""

LLAVA_TEMPLATE = (
    """
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'][0]['text'] }}
    {%- else %}
        {{- message['role'].upper() + ': ' }}
    {%- endif %}"""
    + PARTS_IMAGE_FIRST
    + """
    {%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}
        {{- part['text'] + ' ' }}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"""
)

# The shipped template ends an answer with the text '<\s> ', which is not the end-of-text token.
LLAVA_NEXT_TEMPLATE = (
    """
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' }}"""
    + PARTS_IMAGE_FIRST
    + """
        {%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}
            {{- part['text'] }}
        {%- endfor %}
        {{- ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'][0]['text'] + '<\\\\s> ' }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""
)

QWEN_MESSAGES = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' or 'image' in part %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part['type'] == 'video' or 'video' in part %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# Qwen2.5-VL adds a system message of its own where the conversation has none; Qwen3-VL does not.
QWEN2_5_VL_TEMPLATE = (
    """
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}"""
    + QWEN_MESSAGES
)

SMOLVLM_TEMPLATE = """
{{- '<|im_start|>' }}
{%- for message in messages %}
    {{- message['role'] | capitalize }}
    {%- if message['content'][0]['type'] == 'image' %}{{- ':' }}{%- else %}{{- ': ' }}{%- endif %}
    {%- for part in message['content'] %}
        {%- if part['type'] == 'text' %}
            {{- part['text'] }}
        {%- elif part['type'] == 'image' %}
            {{- '<image>' }}
        {%- endif %}
    {%- endfor %}
    {{- '<end_of_utterance>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"""

# Llama 3's template writes the beginning-of-text token, which its tokenizer also prepends, and
# takes a message's content as a string only.
LLAMA3_TEMPLATE = """
{%- for message in messages %}
    {%- set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.first %}{%- set turn = bos_token + turn %}{%- endif %}
    {{- turn }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""


# -- the families ----------------------------------------------------------------------------------


def build_llava(folder: Path) -> None:
    """LLaVA-1.5: 16 image tokens whatever the image's size."""
    tokenizer = _llama2_tokenizer(folder)
    config = LlavaConfig(
        vision_config=_clip_config(),
        text_config=LlamaConfig(**_text_settings(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    _save_model(LlavaForConditionalGeneration(config), tokenizer, folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    _save_processor_files(
        folder, "CLIPImageProcessor", "LlavaProcessor", LLAVA_TEMPLATE, **_llava_settings()
    )


def build_llava_next(folder: Path, window: int | None = None) -> None:
    """LLaVA-NeXT: a grid of tiles chosen by the image's shape, so a varying number of tokens."""
    pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    tokenizer = _llama2_tokenizer(folder)
    text = MistralConfig(**_text_settings(tokenizer), sliding_window=window)
    config = LlavaNextConfig(
        vision_config=_clip_config(),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    _save_model(LlavaNextForConditionalGeneration(config), tokenizer, folder)
    LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=pinpoints,
    ).save_pretrained(folder)
    _save_processor_files(
        folder,
        "LlavaNextImageProcessor",
        "LlavaNextProcessor",
        LLAVA_NEXT_TEMPLATE,
        **_llava_settings(),
    )


def build_qwen2_5_vl(folder: Path) -> None:
    """Qwen2.5-VL: one token per 28 x 28 pixels, windowed vision attention, three-axis positions."""
    tokenizer = _qwen_tokenizer(folder)
    text = _text_settings(tokenizer) | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        }
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_token_ids(tokenizer))
    _save_model(Qwen2_5_VLForConditionalGeneration(config), tokenizer, folder)
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
    images.save_pretrained(folder)
    _save_processor_files(
        folder, "Qwen2VLImageProcessor", "Qwen2_5_VLProcessor", QWEN2_5_VL_TEMPLATE
    )
    _write_json(folder / "video_preprocessor_config.json", _video_settings("Qwen2VLVideoProcessor"))


def build_qwen3_vl(folder: Path) -> None:
    """Qwen3-VL: one token per 32 x 32 pixels, vision features fed into several text layers."""
    tokenizer = _qwen_tokenizer(folder)
    text = _text_settings(tokenizer) | {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.2,
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_token_ids(tokenizer))
    _save_model(Qwen3VLForConditionalGeneration(config), tokenizer, folder)
    Qwen2VLImageProcessorPil(
        patch_size=16,
        size={"shortest_edge": 32 * 32 * 2, "longest_edge": 32 * 32 * 16},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    _save_processor_files(folder, "Qwen2VLImageProcessorFast", "Qwen3VLProcessor", QWEN_MESSAGES)
    _write_json(folder / "video_preprocessor_config.json", _video_settings("Qwen3VLVideoProcessor"))


def build_smolvlm(folder: Path) -> None:
    """SmolVLM: tiles of 4 tokens, each after its row and column, then the whole image."""
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>"]
    raw = train_byte_tokenizer([*special, "<end_of_utterance>", *rows])
    tokenizer = _wrap_tokenizer(
        raw,
        folder,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        padding_side="right",
        truncation_side="left",
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
    text = LlamaConfig(**_text_settings(tokenizer))
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    config = SmolVLMConfig(
        text_config=text.to_dict() | {"model_type": "llama"},
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save_model(SmolVLMForConditionalGeneration(config), tokenizer, folder)
    SmolVLMImageProcessorPil(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}
    ).save_pretrained(folder)
    _save_processor_files(
        folder, "SmolVLMImageProcessor", "SmolVLMProcessor", SMOLVLM_TEMPLATE, image_seq_len=4
    )
    video = _video_settings("SmolVLMVideoProcessor") | {"num_frames": 4, "fps": 1}
    _write_json(folder / "video_preprocessor_config.json", video)


def build_llama3(folder: Path) -> None:
    """A Llama 3 text model: no images, no padding token of its own."""
    tokenizer = _llama3_tokenizer(folder)
    config = LlamaConfig(**_text_settings(tokenizer))
    _save_model(LlamaForCausalLM(config), tokenizer, folder)


def _llama3_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    raw = train_byte_tokenizer([*special, "<|eot_id|>"])
    _prepend_token(raw, "<|begin_of_text|>")
    return _wrap_tokenizer(
        raw,
        folder,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        padding_side="right",
        chat_template=LLAMA3_TEMPLATE,
        model_max_length=131072,
    )


def build_windowed_mistral(folder: Path) -> None:
    """Mistral's first release: sliding windows in every layer, here shorter than prompts."""
    tokenizer = _llama3_tokenizer(folder)
    config = MistralConfig(**_text_settings(tokenizer), sliding_window=WINDOW)
    _save_model(MistralForCausalLM(config), tokenizer, folder)


def build_qwen2(folder: Path) -> None:
    """A Qwen2 text model."""
    tokenizer = _qwen_tokenizer(folder)
    _save_model(Qwen2ForCausalLM(Qwen2Config(**_text_settings(tokenizer))), tokenizer, folder)
    (folder / "chat_template.jinja").write_text(QWEN_MESSAGES, encoding="utf-8")


def build_gemma3(folder: Path) -> None:
    """A Gemma 3 text model: sliding windows in some layers. Its family is not declared."""
    tokenizer = _llama3_tokenizer(folder)
    config = Gemma3TextConfig(
        **_text_settings(tokenizer),
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )
    _save_model(Gemma3ForCausalLM(config), tokenizer, folder)


def build_windowed_llava_next(folder: Path) -> None:
    """LLaVA-NeXT with a language model with sliding windows."""
    build_llava_next(folder, WINDOW)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "llava": build_llava,
    "llava_next": build_llava_next,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_vl": build_qwen3_vl,
    "smolvlm": build_smolvlm,
    "llama3": build_llama3,
}

# With sliding-window attention: prompts cannot share rows.
WINDOWED: dict[str, Callable[[Path], None]] = {
    "windowed_mistral": build_windowed_mistral,
    "gemma3": build_gemma3,
    "windowed_llava_next": build_windowed_llava_next,
}

# Declared families whose attention the models above have too.
OTHER: dict[str, Callable[[Path], None]] = {"qwen2": build_qwen2}


# -- helpers of the builders -----------------------------------------------------------------------


def _wrap_tokenizer(raw: Tokenizer, folder: Path, **settings: Any) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _llama2_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return _wrap_tokenizer(
        train_sentencepiece_tokenizer(["<image>", "<pad>"]),
        folder,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def _qwen_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return _wrap_tokenizer(
        train_byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision]),
        folder,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="right",
        model_max_length=131072,
    )


def _qwen_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _end_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _text_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        **_end_ids(tokenizer),
    }


def _clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        initializer_range=0.2,
    )


def _llava_settings() -> dict[str, Any]:
    return {
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }


def _video_settings(class_name: str) -> dict[str, Any]:
    return {"video_processor_type": class_name}


def _save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = GenerationConfig(**_end_ids(tokenizer))
    model.eval().save_pretrained(folder)


def _save_processor_files(
    folder: Path, image_type: str, processor_class: str, template: str, **settings: Any
) -> None:
    """Write the processor files of a checkout, with the hub's class name of the image processor.

    A model with processor settings has them in a separate file, and its template in Jinja; one
    without (Qwen) has neither file, and its template in the older JSON file.
    """
    path = folder / "preprocessor_config.json"
    image_settings = json.loads(path.read_text(encoding="utf-8"))
    kind = {"image_processor_type": image_type, "processor_class": processor_class}
    _write_json(path, image_settings | kind)
    if not settings:
        _write_json(folder / "chat_template.json", {"chat_template": template})
        return
    _write_json(folder / "processor_config.json", settings | {"processor_class": processor_class})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
