"""Every bench of the model stages runs and says all of it, on the small world."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
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

from bench import models, racing, scoring, shapes
from mllm_msr.core import tables
from mllm_msr.core.params import SftParams, load_params
from mllm_msr.core.tables import write_rows
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.method.adapters import add_adapter

POCKET = Path("mllm_msr/pocket/model").resolve()
SIDE = {
    *("many", "seconds", "per_second", "tokens", "necessary_tokens", "computed_over_necessary"),
    "peak_gb",
}
LINE = {
    *("case", "what", "ours", "reference", "ratio", "ratio_min", "ratio_max", "repeats"),
    "machine",
}
Bench = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with settings, prompts, the small world, and an adapter that changes scores."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy("prompts.yaml", folder)
    write_settings(folder, POCKET, evaluate={"bootstrap_samples": 20})
    world = write_small_world(folder / "data")
    # The reference pads images with black to the largest, and so changes those of other sizes.
    image_refs = [image_row(item, (64, 64)) for item, *_, size in CATALOGUE if size]
    write_rows(tables.Images, image_refs, world.images)
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
    """Run a case as the command does, both sides in this process, which has imported all of it."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(racing, "own_process", lambda: ThreadPoolExecutor(1))
    for module in ("bench.racing", "mllm_msr.engines.local"):  # one thread: the model is small
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
        assert side["many"] > 0
        assert side["seconds"] > 0
        assert side["peak_gb"] > 0
    assert line["ratio_min"] <= line["ratio"] <= line["ratio_max"]


def test_the_reference_gives_the_scores_that_the_stage_gives(bench: Bench) -> None:
    line = bench("scoring")
    assert_complete(line)
    assert line["ours"]["many"] == line["reference"]["many"] == 3
    assert 0 < line["largest_difference"] < 1e-4
    # Of 30 tokens that it generates for each pair, 29 are read again, and none had to be.
    assert line["reference"]["tokens"] >= line["reference"]["necessary_tokens"] + 3 * 29
    assert line["ours"]["share_of_matrix_rate"] >= 0


def test_the_reference_infers_the_preferences_that_the_stage_infers(bench: Bench) -> None:
    line = bench("preferences", "--of-reference", "2")
    assert_complete(line)
    assert (line["ours"]["many"], line["reference"]["many"]) == (3, 2)
    assert line["same_texts"] == 1.0
    # The reference reads whole prompts, one at a time: no padding, and every beginning anew.
    assert line["reference"]["computed_over_necessary"] > 1


def test_training_is_timed_over_all_epochs_in_batches_of_the_size_asked_for(bench: Bench) -> None:
    line = bench("training", "--batch-size", "1", "--of-reference", "1")
    assert_complete(line)
    assert line["ours"]["epochs"] == 1
    assert (line["ours"]["many"], line["reference"]["many"]) == (2, 1)
    assert line["ours"]["batch_size"] == line["reference"]["batch_size"] == 1
    # Alone in its batch and without padding, a prompt takes what it has to.
    assert line["reference"]["computed_over_necessary"] == 1.0


def test_training_packed_and_by_whole_prompts_are_compared_by_their_auc(bench: Bench) -> None:
    line = bench("quality")
    assert_complete(line)
    for name in ("valid_auc", "valid_auc_low", "valid_auc_high"):
        assert line["ours"][name] == pytest.approx(line["reference"][name], abs=1e-4)
    assert line["auc_difference_low"] <= line["auc_difference"] <= line["auc_difference_high"]


def test_a_model_of_the_shapes_of_another_is_benched_in_its_place(
    bench: Bench, tmp_path: Path
) -> None:
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


def test_a_case_without_a_bench_is_refused() -> None:
    ended = CliRunner().invoke(models.app, ["--case", "speed"])
    assert ended.exit_code == 2
    assert "scoring" in ended.stderr


def test_the_matrix_rate_is_compared_with_the_weights_of_the_base_model_alone() -> None:
    model = LocalModel(Encoder(str(POCKET), None, None))
    bare = model.load()
    text = model.encoder.config.get_text_config()
    width, inner = text.hidden_size, text.intermediate_size
    adapted = add_adapter(bare, 4, 8, 0.0, ["q_proj", "down_proj"])
    counted = scoring.linear_weights(adapted)
    assert counted == text.num_hidden_layers * (4 * width**2 + 3 * width * inner)


def test_tokens_are_counted_as_prompts_or_as_answers_under_way() -> None:
    bare = LocalModel(Encoder(str(POCKET), None, None)).load()
    count = racing.TokenCount(bare)
    ids = torch.full((2, 5), 7)
    bare.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3
    )
    assert (count.read, count.answered, count.tokens) == (10, 4, 14)
