"""Bundles: what is exported is loaded with the same results, and refused where it has changed."""

import json
import shutil
from pathlib import Path

import pytest
from small_run import MODEL, work_in

from mllm_msr.core.errors import DataError, ModelError, ParamsError, UserError
from mllm_msr.recommendation import bundle
from mllm_msr.recommendation.bundle import MANIFEST, export, list_exports, read_bundle


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the run with its base model, into a folder of its own."""
    folder = tmp_path_factory.mktemp("elsewhere") / "bundle"
    with work_in(run_folder):
        export(Path("data"), Path("params.yaml"), Path("prompts.yaml"), folder, with_base=True)
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def answers(data: Path) -> list[object]:
    from mllm_msr import Recommender

    with Recommender.load(data, candidates=10) as loaded:
        first, second = list(loaded.catalogue.titles)[:2]
        user = next(loaded._histories.all())[0]
        return [
            loaded.recommend(user=user, k=3),
            loaded.recommend(history=[first, second], k=3),
            loaded.recommend(history=[], k=3),
            loaded.rank([first], [second, first]),
        ]


@pytest.mark.slow
def test_a_bundle_gives_the_results_of_the_run_elsewhere(
    run_folder: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with work_in(run_folder):
        monkeypatch.setenv("MLLM_MSR_RESPONSES", str(tmp_path / "run.sqlite"))
        expected = answers(run_folder / "data")
    with work_in(tmp_path):  # neither settings, prompts, retrievers nor responses are here
        monkeypatch.setenv("MLLM_MSR_RESPONSES", str(tmp_path / "bundle.sqlite"))
        assert answers(exported) == expected


@pytest.mark.slow
def test_a_merged_model_is_one_that_loads_alone(run_folder: Path, tmp_path: Path) -> None:
    import torch

    from mllm_msr.engines.encoding import Encoder
    from mllm_msr.engines.local import load_weights

    folder = tmp_path / "bundle"
    with work_in(run_folder):
        export(Path("data"), Path("params.yaml"), Path("prompts.yaml"), folder, merged=True)
    assert "merged/model.safetensors" in read_bundle(folder).files
    merged, base = (
        load_weights(Encoder(name, None, None), torch.float32)
        for name in (str(folder / "merged"), MODEL)
    )
    assert merged.state_dict().keys() == base.state_dict().keys()
    changed = {
        name
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, base.state_dict()[name])
    }
    assert changed
    assert all("language_model" in name and "_proj" in name for name in changed)


def test_the_manifest_names_version_base_models_and_every_file(exported: Path) -> None:
    manifest = read_bundle(exported)
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*.*")}
    files = {name for name in files if (exported / name).is_file()}
    assert set(manifest.files) == files - {MANIFEST}
    assert set(manifest.models) == {"summarize_items", "infer_preferences", "recommender"}
    for record in manifest.models.values():
        assert (record.name, record.revision) == (MODEL, None)
        assert record.folder == "models/recommender"
    assert "retrievers/item_knn.safetensors" in files
    assert not any("preferences" in name or name.endswith(".sqlite") for name in files)


def test_an_export_is_noted(run_folder: Path, exported: Path) -> None:
    with work_in(run_folder):
        assert exported.resolve() in list_exports()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "prompts.yaml").unlink(), r"prompts.yaml: .*got no such file"),
        (
            lambda f: (f / "sft/adapter/adapter_model.safetensors").write_bytes(b"another"),
            r"adapter_model.safetensors: expected the file that was exported; got another one",
        ),
        (lambda f: change(f, format=2), r"bundle.json: expected a bundle of format 1; got format"),
        (lambda f: change(f, models=None), r"bundle.json: expected the manifest of a bundle"),
        (lambda f: change(f, files={"../x": "0"}), r"bundle.json: expected the manifest"),
        (lambda f: (f / MANIFEST).write_text("{"), r"bundle.json: expected the manifest"),
        (
            lambda f: (f / MANIFEST).unlink(),
            "a complete bundle, with bundle.json; got none",
        ),
    ],
)
def test_a_bundle_that_is_not_as_exported_is_refused(copied: Path, damage, message: str) -> None:
    from mllm_msr import Recommender

    damage(copied)
    with pytest.raises(DataError, match=message) as raised:
        Recommender.load(copied)
    assert "\n" not in str(raised.value)


def change(folder: Path, **fields: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_another_base_model_is_refused(copied: Path, tmp_path: Path) -> None:
    from mllm_msr import Recommender

    models = json.loads((copied / MANIFEST).read_text())["models"]
    moved = {role: record | {"folder": None} for role, record in models.items()}
    for record in moved.values():
        record["name"] = str(tmp_path / "none")
    change(copied, models=moved)
    with pytest.raises(ModelError, match=r"the folder of a base model; got no such .*--with-base"):
        Recommender.load(copied)
    other = shutil.copytree(MODEL, tmp_path / "none")
    (other / "added.txt").write_text("part of the identity")
    with pytest.raises(ModelError, match=r"an adapter of this model|from which the"):
        Recommender.load(copied)


def test_other_settings_and_retrievers_than_its_own_are_refused(
    exported: Path, run_folder: Path
) -> None:
    from mllm_msr import Recommender

    for given in ({"params": run_folder / "params.yaml"}, {"prompts": "prompts.yaml"}):
        with pytest.raises(ParamsError, match="the bundle's own settings and prompts"):
            Recommender.load(exported, **given)
    with pytest.raises(ParamsError, match="expected one of popularity, item_knn; got 'sasrec'"):
        Recommender.load(exported, retriever="sasrec")


@pytest.mark.usefixtures("in_run_folder")
def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("broken")

    monkeypatch.setattr(bundle, "_copy_model", fail)
    folder = tmp_path / "bundle"
    paths = Path("data"), Path("params.yaml"), Path("prompts.yaml")
    with pytest.raises(OSError, match="broken"):
        export(*paths, folder, with_base=True)
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    with pytest.raises(UserError, match="expected a new folder"):
        export(*paths, folder)
