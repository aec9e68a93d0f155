"""Detection of the pocket model and its copies."""

import shutil
from pathlib import Path

import pytest
import yaml

from mllm_msr.core.errors import ParamsError
from mllm_msr.core.params import PreprocessParams
from mllm_msr.pocket.identity import (
    SHIPPED,
    find_misused_pocket_models,
    is_pocket_model,
    refuse_pocket_model,
)

NAME = "mllm_msr/pocket/model"


def preprocess(source: str, allowed: bool) -> PreprocessParams:
    section = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["preprocess"]
    changes = {"source": source, "allow_pocket_model": allowed}
    return PreprocessParams.model_validate(section | changes)


@pytest.mark.parametrize("name", [NAME, f"./{NAME}/", str(SHIPPED)])
def test_the_shipped_folder_is_the_pocket_model(name: str) -> None:
    assert is_pocket_model(name)


def test_a_copy_is_the_pocket_model(tmp_path: Path) -> None:
    assert is_pocket_model(str(shutil.copytree(SHIPPED, tmp_path / "real-model")))


def test_other_weights_with_its_tokenizer_are_the_pocket_model(tmp_path: Path) -> None:
    folder = shutil.copytree(SHIPPED, tmp_path / "tuned")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert is_pocket_model(str(folder))


def test_another_model_is_not_the_pocket_model(tmp_path: Path) -> None:
    folder = shutil.copytree(SHIPPED, tmp_path / "other")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert not is_pocket_model(str(folder))


@pytest.mark.parametrize("name", ["llava-hf/llava-v1.6-mistral-7b-hf", "pocket/model"])
def test_a_hub_model_is_not_the_pocket_model(name: str) -> None:
    assert not is_pocket_model(name)


def test_misused_settings_are_listed() -> None:
    models = {"summarize_items.model": NAME, "encode_items.model": None, "recommender.model": "hub"}
    assert find_misused_pocket_models("tables", models) == ["summarize_items.model"]
    assert find_misused_pocket_models("pocket", models) == []


@pytest.mark.parametrize("source", ["tables", "amazon", "microlens"])
def test_it_is_refused_for_other_sources_unless_allowed(source: str) -> None:
    refuse_pocket_model("recommender.model", NAME, preprocess(source, allowed=True))
    refuse_pocket_model("recommender.model", NAME, preprocess("pocket", allowed=False))
    with pytest.raises(ParamsError, match=f"preprocess.source: {source}; got the pocket model"):
        refuse_pocket_model("recommender.model", NAME, preprocess(source, allowed=False))
