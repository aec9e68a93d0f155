"""The worked example of docs/extending.md: a new model family packs, and changes no logit."""

import re
from pathlib import Path

import families as small_models
import pytest
import torch
from generating import generate
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from mllm_msr.engines import families
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.families import ModelFamily
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.packing import Packer, make_packer
from mllm_msr.engines.prompt import Prompt
from mllm_msr.images.gallery import Gallery

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"


def declared_family() -> ModelFamily:
    """Run the example's code block."""
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text.split("## Model family", 1)[1].split("\n## ", 1)[0]
    [code] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names: dict[str, ModelFamily] = {}
    exec(code, names)
    return names["QWEN2_VL"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small Qwen2-VL with random weights."""
    path = tmp_path_factory.mktemp("qwen2_vl")
    torch.manual_seed(small_models.SEED)
    tokenizer = small_models._qwen_tokenizer(path)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        text_config=small_models._text_settings(tokenizer) | {"rope_parameters": rope},
        vision_config={
            **{"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2},
            **{"hidden_size": small_models.HIDDEN, "initializer_range": 0.2},
        },
        **small_models._qwen_token_ids(tokenizer),
    )
    small_models._save_model(Qwen2VLForConditionalGeneration(config), tokenizer, path)
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
    images.save_pretrained(path)
    small_models._save_processor_files(
        path, "Qwen2VLImageProcessor", "Qwen2VLProcessor", small_models.QWEN2_5_VL_TEMPLATE
    )
    video = small_models._video_settings("Qwen2VLVideoProcessor")
    small_models._write_json(path / "video_preprocessor_config.json", video)
    return path


@pytest.fixture
def prompts(gallery: Gallery) -> list[Prompt]:
    image_refs = [gallery.image_ref(item) for item in "abc"]
    asked = ["Likes red.", "Likes red and blue things, cats, travel."]
    return [
        Prompt("", image_ref, f"{text} Yes or no?") for image_ref in image_refs for text in asked
    ]


def test_the_example_packs_and_changes_no_logit(
    build: object,  # keeps models of this session on the CPU
    folder: Path,
    gallery: Gallery,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert build
    declared = (*families.FAMILIES, declared_family())
    monkeypatch.setattr(families, "FAMILIES", declared)
    model = LocalModel(Encoder(str(folder), None, gallery))
    packer = make_packer(model.encoder, model.weights)
    assert type(packer) is Packer
    packed = packer.pack(prompts)
    assert len(packed.inputs["input_ids"]) < len(prompts)
    with torch.no_grad():
        logits = packer.run(model.weights, packed)
        plain = [model.weights(**model.encoder.encode([p])).logits[0, -1] for p in prompts]
    torch.testing.assert_close(logits, torch.stack(plain), atol=1e-4, rtol=0)
    assert packer.image_features.computed == 3
    responses = generate(model, prompts, max_new_tokens=4)
    assert responses == [generate(model, [prompt], 4)[0] for prompt in prompts]


def test_without_the_declaration_prompts_run_whole(
    build: object, folder: Path, gallery: Gallery, prompts: list[Prompt]
) -> None:
    assert build
    model = LocalModel(Encoder(str(folder), None, gallery))
    assert make_packer(model.encoder, model.weights) is None
    assert model.decoder is None
    assert [len(batch) for batch in model.batches(prompts)] == [len(prompts)]


def test_the_document_names_every_field() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    fields = ModelFamily.__dataclass_fields__.keys() - {"name", "model_types"}
    assert all(f"| `{name}` |" in text for name in fields)
