"""Bundles: a finished run as one folder that another machine loads without the pipeline.

A bundle has the tables, settings, prompts, adapter and trained retrievers that recommendation
reads, in the layout of the stages' outputs, and ``bundle.json`` with the SHA-256 of every file. No
response and no preference of a user is in it, but the interactions of all users are.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

import mllm_msr
from mllm_msr.baselines.discovery import find_baseline
from mllm_msr.core.errors import DataError, ModelError, ParamsError
from mllm_msr.core.files import atomic_write, file_digest, state_dir
from mllm_msr.core.params import Params, PathBelow, RecommenderParams, load_all_params
from mllm_msr.engines.encoding import IDENTIFYING_FILES, Encoder
from mllm_msr.method.adapters import ADAPTER_FILES, check_adapter, read_record
from mllm_msr.method.merging import write_merged_model
from mllm_msr.method.prompts import load_prompts
from mllm_msr.recommendation.catalogue import read_catalogue
from mllm_msr.recommendation.retrieval import FEATURES, keep_retrievers

MANIFEST, PARAMS, PROMPTS = "bundle.json", "params.yaml", "prompts.yaml"
RETRIEVERS, MODELS, MERGED = "retrievers", "models", "merged"  # folders
EXPORTS = "bundles.txt"  # in the state directory: the path of each exported bundle
VERSION: Literal[1] = 1  # of the format; another one is not loaded
TABLES = (  # what recommendation reads; the retrievers read the sequences and candidates
    "preprocess/interactions.parquet",
    "filter_sequences/items.parquet",
    "filter_sequences/popularity.parquet",
    "filter_sequences/sequences.parquet",
    "filter_sequences/histories.parquet",
    "filter_sequences/selection_candidates.parquet",
    "filter_sequences/valid_candidates.parquet",
    "filter_sequences/test_candidates.parquet",
    "summarize_items/summaries.parquet",
)
IMAGES = "fetch_images/images.parquet"
ADAPTER = ("sft/training.json", *(f"sft/adapter/{name}" for name in ADAPTER_FILES))
COPY_AGAIN = "copy the bundle again, or export it again with mllm-msr export"


class BaseModelRecord(BaseModel):
    """A model that a bundle needs.

    Attributes:
        name: Folder or hub name, as in the settings of the run.
        revision: The commit of a hub model; None for a folder.
        identity: That of response keys: the commit, or the SHA-256 of the folder's files.
        folder: Its folder in the bundle; None where the bundle does not have it.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: str
    revision: str | None
    identity: str
    folder: PathBelow | None


class Manifest(BaseModel):
    """The contents of ``bundle.json``.

    Attributes:
        format: Version of the format.
        version: Of the project that wrote it.
        models: By section of the settings.
        files: SHA-256 of every other file, by its path in the bundle.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1]
    version: str
    models: dict[str, BaseModelRecord]
    files: dict[PathBelow, str]


class _Version(BaseModel):
    """What every version of ``bundle.json`` says."""

    format: int


class Exported(NamedTuple):
    """A bundle that was written.

    Attributes:
        files: Number of its files.
        size: Of all of them, in bytes.
        retrievers: The trained ones that it has.
        left_out: Local models that it names and does not have.
    """

    files: int
    size: int
    retrievers: list[str]
    left_out: list[str]


class Run(NamedTuple):
    """Where a finished run is read from, besides its tables.

    Attributes:
        settings: Of the run.
        prompts: The file of prompt templates.
        identities: Of the models that a bundle names, by section; none of another run.
        retrievers: Folder of a bundle's trained retrievers; None: the state directory.
    """

    settings: Params
    prompts: Path
    identities: Mapping[str, str]
    retrievers: Path | None


def is_bundle(folder: Path) -> bool:
    """Return whether a folder is a bundle."""
    return (folder / MANIFEST).is_file()


def open_run(folder: Path, params: Path | None, prompts: Path | None) -> Run:
    """Read the settings of a run; verify a bundle.

    Args:
        folder: Of the stages' outputs, or a bundle.
        params: Settings; None: ``params.yaml``, of the bundle or of the working folder.
        prompts: Prompt templates; None: ``prompts.yaml``, likewise.

    Raises:
        ParamsError: A setting is wrong, or there are others than those of the bundle.
        DataError: The bundle is of another version, or a file of it is missing or has changed.
        ModelError: A model is neither in the bundle nor where its settings say.
    """
    if not is_bundle(folder):
        if (folder / RETRIEVERS).is_dir():  # only a bundle has it
            raise DataError(
                expected=f"a complete bundle, with {MANIFEST}",
                got="none",
                where=str(folder),
                fix="copy the whole bundle again",
            )
        settings = load_all_params(params or Path(PARAMS))
        return Run(settings, prompts or Path(PROMPTS), {}, None)
    if params or prompts:
        raise ParamsError(
            expected="the bundle's own settings and prompts",
            got=str(params or prompts),
            where=str(folder),
            fix="leave params and prompts out; for others export another bundle",
        )
    manifest = read_bundle(folder)
    identities = {role: record.identity for role, record in manifest.models.items()}
    settings = _read_settings(folder, manifest)
    return Run(settings, folder / PROMPTS, identities, folder / RETRIEVERS)


def read_bundle(folder: Path) -> Manifest:
    """Read ``bundle.json``, and compare every file with it.

    Raises:
        DataError: It is of another version or broken, or a file is missing or has changed.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        found = _Version.model_validate_json(text).format
        if found != VERSION:
            raise DataError(
                expected=f"a bundle of format {VERSION}",
                got=f"format {found}",
                where=str(path),
                fix="load it with the release that wrote it, or export it again with this one",
            )
        manifest = Manifest.model_validate_json(text)
    except (OSError, ValidationError) as error:
        got = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DataError(
            expected="the manifest of a bundle", got=got, where=str(path), fix=COPY_AGAIN
        ) from error
    for name, digest in manifest.files.items():
        _check_file(folder / name, digest)
    return manifest


def export(
    data: Path,
    params: Path,
    prompts: Path,
    folder: Path,
    *,
    with_base: bool = False,
    merged: bool = False,
) -> Exported:
    """Write a finished run as a bundle; the folder appears when it is complete.

    Args:
        data: Folder of the stages' outputs.
        params: Settings of the run.
        prompts: The file of prompt templates.
        folder: The bundle, a new folder.
        with_base: Whether to copy the models that are local folders.
        merged: Whether to add base model and adapter as one model, for inference servers.

    Raises:
        DataError: The folder exists, a table is missing or breaks its model, or the disk is full.
        ModelError: There is no trained model, or it is one of another base model; or a base model
            to copy is one of the hub, or has no safetensors.
    """
    if folder.exists():
        raise DataError(
            expected="a new folder",
            got="an existing one",
            where=str(folder),
            fix="name another folder, or remove this one",
        )
    settings = load_all_params(params)
    load_prompts("recommender", prompts)
    read_catalogue(data)  # refuses tables that are missing or damaged
    models = dict(_describe_models(settings, with_base=with_base))
    if "recommender" in models:
        _check_trained(data / "sft", models["recommender"])
    with atomic_write(folder) as new:
        retrievers = keep_retrievers(data, settings, new / RETRIEVERS)
        sources = _list_sources(data, retrievers, with_model="recommender" in models)
        for name, source in (sources | {PARAMS: params, PROMPTS: prompts}).items():
            _copy(source, new / name)
        for record in models.values():
            if record.folder and not (new / record.folder).exists():
                _copy_model(Path(record.name), new / record.folder)
        if merged:
            _merge(settings.recommender, prompts, data / "sft/adapter", new / MERGED)
        files = sorted(path for path in new.rglob("*") if path.is_file())
        manifest = Manifest(
            format=VERSION,
            version=mllm_msr.__version__,
            models=models,
            files={path.relative_to(new).as_posix(): file_digest(path) for path in files},
        )
        (new / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        size = sum(path.stat().st_size for path in [*files, new / MANIFEST])
    _note_export(folder)
    left_out = {each.name for each in models.values() if not (each.folder or each.revision)}
    return Exported(len(files) + 1, size, retrievers, sorted(left_out))


def list_exports() -> list[Path]:
    """Return the bundles exported from this project that are still where they were written."""
    path = state_dir() / EXPORTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [folder for folder in map(Path, dict.fromkeys(lines)) if is_bundle(folder)]


def _check_file(path: Path, digest: str) -> None:
    """Refuse a file of a bundle that is missing or has changed."""
    got = None if path.is_file() else "no such file"
    if got is None and file_digest(path) != digest:
        got = "another one"
    if got:
        raise DataError(
            expected="the file that was exported", got=got, where=str(path), fix=COPY_AGAIN
        )


def _read_settings(folder: Path, manifest: Manifest) -> Params:
    """Read a bundle's settings, with its own models where it has them."""
    settings = load_all_params(folder / PARAMS)
    changes = {}
    for role, record in manifest.models.items():
        name = str(folder / record.folder) if record.folder else record.name
        if record.revision is None and not Path(name).is_dir():
            raise ModelError(
                expected="the folder of a base model",
                got="no such folder",
                where=name,
                fix="copy the model there, or export the bundle with --with-base",
            )
        update = {"model": name, "revision": record.revision}
        changes[role] = getattr(settings, role).model_copy(update=update)
    return settings.model_copy(update=changes)


def _describe_models(settings: Params, *, with_base: bool) -> Iterator[tuple[str, BaseModelRecord]]:
    """Yield the sections whose model recommendation needs, each with its record."""
    if settings.recommender.model is None:
        return
    sections: dict[str, Any] = {"recommender": settings.recommender}
    if settings.infer_preferences.mode != "none":
        sections["infer_preferences"] = settings.infer_preferences
    if not settings.summarize_items.copies_texts and settings.summarize_items.model:
        sections["summarize_items"] = settings.summarize_items  # of items new to the catalogue
    folders: dict[str, str] = {}
    for role, section in sections.items():
        encoder = Encoder(section.model, section.revision, None, section.system_message)
        if with_base:
            _check_copyable(Path(encoder.name))
            folders.setdefault(encoder.name, f"{MODELS}/{role}")
        folder = folders.get(encoder.name)
        yield (
            role,
            BaseModelRecord(
                name=encoder.name,
                revision=encoder.revision,
                identity=encoder.identity,
                folder=folder,
            ),
        )


def _merge(settings: RecommenderParams, prompts: Path, adapter: Path, folder: Path) -> None:
    """Write the recommender as one model.

    Raises:
        ModelError: There is no recommender.
    """
    if settings.model is None:
        fix = "name a model, run the stage sft, then export again"
        raise ModelError(
            expected="a recommender to merge", got="null", where="recommender.model", fix=fix
        )
    templates = load_prompts("recommender", prompts)
    encoder = Encoder(settings.model, settings.revision, None, settings.system_message)
    answers = (templates["answer_yes"], templates["answer_no"])
    write_merged_model(encoder, adapter, answers, folder)


def _check_copyable(folder: Path) -> None:
    """Refuse to copy a model of the hub, and one without safetensors."""
    if not folder.is_dir():
        raise ModelError(
            expected="a base model in a local folder",
            got="a model of the hub",
            where=str(folder),
            fix="leave --with-base out: the bundle names the commit",
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            expected="weights in safetensors",
            got="none",
            where=str(folder),
            fix="convert the model's weights",
        )


def _check_trained(trained: Path, base: BaseModelRecord) -> None:
    """Refuse an adapter that has changed, and one of another base model."""
    record = read_record(trained)
    if record.model != base.identity:
        raise ModelError(
            expected="an adapter of this model",
            got="one of another",
            where=str(trained),
            fix="run the stage sft for this model",
        )
    check_adapter(trained / "adapter", record)


def _list_sources(data: Path, retrievers: list[str], *, with_model: bool) -> dict[str, Path]:
    """Return the files of the stages that a bundle has, by their paths in it."""
    names = [*TABLES, *((IMAGES, *ADAPTER) if with_model else ())]
    if any(find_baseline(name).stage == "feature_baselines" for name in retrievers):
        names.append(FEATURES)
    return {name: data / name for name in names}


def _copy(source: Path, target: Path) -> None:
    """Copy a file, or the file that a link of DVC's leads to."""
    if not source.is_file():
        raise DataError(
            expected="an output of a stage", got="no such file", where=str(source), fix="dvc repro"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _copy_model(folder: Path, target: Path) -> None:
    """Copy the files that a model's identity is made of: no code, no other form of weights."""
    for pattern in IDENTIFYING_FILES:
        for path in folder.glob(pattern):
            _copy(path, target / path.name)


def _note_export(folder: Path) -> None:
    """Note where a bundle is, so that forgetting a user can name it."""
    path = state_dir() / EXPORTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{folder.resolve()}\n")
