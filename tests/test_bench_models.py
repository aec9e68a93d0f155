"""Every benchmark of the model stages runs on the small world with all output fields."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from small_world import CATALOGUE, image_row, write_settings, write_small_world
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from typer.testing import CliRunner

from bench import models, shapes, timing
from bench.reference import Reference
from mllm_msr.core import schemas
from mllm_msr.core.params import SftParams, load_params
from mllm_msr.core.tables import write_rows
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.method.adapters import add_adapter

POCKET = Path("mllm_msr/pocket/model").resolve()
SIDE = {
    *("count", "seconds", "per_second", "tokens", "necessary_tokens", "computed_over_necessary"),
    "peak_gb",
}
LINE = {
    *("case", "what", "ours", "reference", "ratio", "ratio_min", "ratio_max", "repeats"),
    "machine",
}
Bench = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with settings, prompts, the small world and a non-trivial adapter."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy("prompts.yaml", folder)
    write_settings(folder, POCKET, evaluate={"bootstrap_samples": 20})
    world = write_small_world(folder / "data")
    # Equal sizes, because the reference pads smaller images with black.
    image_refs = [image_row(item, (64, 64)) for item, *_, size in CATALOGUE if size]
    write_rows(schemas.Images, image_refs, world.images)
    lora = load_params(SftParams, folder / "params.yaml").lora
    bare = LocalModel(Encoder(str(POCKET), None, None)).load()
    adapted = add_adapter(bare, lora.rank, lora.alpha, lora.dropout, lora.layers)
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    adapted.save_pretrained(str(folder / "data/sft/adapter"))
    return folder


@pytest.fixture
def bench(project: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Run a case as the command does, both sides in this process to avoid repeated imports."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(timing, "start_process", lambda: ThreadPoolExecutor(1))
    for module in ("bench.timing", "mllm_msr.engines.local"):  # one thread: the model is small
        monkeypatch.setattr(f"{module}.find_device", lambda: torch.device("cpu"))
    torch.set_num_threads(1)

    def run(case: str, *options: str) -> dict[str, Any]:
        words = ["--case", case, "--repeats", "1", *options]
        ended = CliRunner().invoke(models.app, words, catch_exceptions=False)
        line: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return line

    return run


def assert_complete(line: dict[str, Any]) -> None:
    assert line.keys() >= LINE
    for side in (line["ours"], line["reference"]):
        assert side.keys() >= SIDE
        assert side["count"] > 0
        assert side["seconds"] > 0
        assert side["peak_gb"] > 0
    assert line["ratio_min"] <= line["ratio"] <= line["ratio_max"]


@pytest.mark.slow
def test_the_reference_gives_the_same_scores(bench: Bench) -> None:
    line = bench("scoring")
    assert_complete(line)
    assert line["ours"]["count"] == line["reference"]["count"] == 3
    assert 0 < line["largest_difference"] < 1e-4
    # The reference feeds back 29 of the 30 tokens that it generates per pair; none is necessary.
    assert line["reference"]["tokens"] >= line["reference"]["necessary_tokens"] + 3 * 29
    assert 0 < line["ours"]["share_of_matrix_rate"] <= 1


@pytest.mark.slow
def test_the_reference_gives_the_same_preferences(bench: Bench) -> None:
    line = bench("preferences", "--reference-count", "2")
    assert_complete(line)
    assert (line["ours"]["count"], line["reference"]["count"]) == (3, 2)
    assert line["same_texts"] == 1.0
    # The reference computes whole prompts one at a time, without shared prefixes.
    assert line["reference"]["computed_over_necessary"] > 1


@pytest.mark.slow
def test_training_is_timed_with_the_given_batch_size(bench: Bench) -> None:
    line = bench("training", "--batch-size", "1", "--reference-count", "1")
    assert_complete(line)
    assert line["ours"]["epochs"] == 1
    assert (line["ours"]["count"], line["reference"]["count"]) == (2, 1)
    assert line["ours"]["batch_size"] == line["reference"]["batch_size"] == 1
    # A single prompt per batch has no padding and nothing to share.
    assert line["reference"]["computed_over_necessary"] == 1.0


@pytest.mark.slow
def test_packed_and_whole_prompt_training_are_compared_by_auc(bench: Bench) -> None:
    line = bench("quality")
    assert_complete(line)
    for name in ("valid_auc", "valid_auc_low", "valid_auc_high"):
        assert line["ours"][name] == pytest.approx(line["reference"][name], abs=1e-4)
    assert line["auc_difference_low"] <= line["auc_difference"] <= line["auc_difference_high"]


@pytest.mark.slow
def test_a_random_model_can_replace_the_pipelines_model(bench: Bench, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    special = shapes.special_ids(tokenizer)
    narrow = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = LlamaConfig(vocab_size=1_000, max_position_embeddings=8_192, **narrow)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=16, **narrow),
        text_config=text,
        image_grid_pinpoints=shapes.TILES,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **special,
    )
    processor = shapes.llava_processor(tokenizer)
    shapes.save(LlavaNextForConditionalGeneration, config, processor, tmp_path / "llava")
    line = bench("scoring-short", "--model", str(tmp_path / "llava"))
    assert_complete(line)
    assert line["ours"]["necessary_tokens"] > 3 * 576  # image tokens of a tile
    assert line["largest_difference"] < 1e-4

    language = LlamaConfig(vocab_size=1_000, max_position_embeddings=8_192, **narrow, **special)
    shapes.save(LlamaForCausalLM, language, tokenizer, tmp_path / "llama")
    assert_complete(bench("preferences", "--model", str(tmp_path / "llama")))


def test_an_unknown_case_is_refused() -> None:
    ended = CliRunner().invoke(models.app, ["--case", "speed"])
    assert ended.exit_code == 2
    assert "scoring" in ended.stderr


def test_the_reference_runs_pefts_layers() -> None:
    model = LocalModel(Encoder(str(POCKET), None, None))
    adapted = add_adapter(model.load(), 4, 8, 0.0, ["q_proj"])
    Reference(model.encoder, {}, adapted)
    found = {type(module) for module in adapted.modules() if isinstance(module, Linear)}
    assert found == {Linear}


def test_linear_weights_exclude_the_adapter() -> None:
    model = LocalModel(Encoder(str(POCKET), None, None))
    bare = model.load()
    text = model.encoder.config.get_text_config()
    width, inner = text.hidden_size, text.intermediate_size
    adapted = add_adapter(bare, 4, 8, 0.0, ["q_proj", "down_proj"])
    counted = timing.linear_weights(timing.decoder_layers(adapted.get_base_model()))
    assert counted == text.num_hidden_layers * (4 * width**2 + 3 * width * inner)


def test_prompt_and_generated_tokens_are_counted_separately() -> None:
    bare = LocalModel(Encoder(str(POCKET), None, None)).load()
    count = timing.TokenCount(bare)
    ids = torch.full((2, 5), 7)
    bare.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3
    )
    assert (count.read, count.generated, count.tokens) == (10, 4, 14)
