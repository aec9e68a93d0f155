"""Every setting of the pipeline: :class:`Params` is the whole of ``params.yaml``.

Each section is a frozen model; those of baselines are declared in the baselines' own files. Unknown
and missing keys are errors that name both. Nothing about the machine lives here (device, dtype,
number of processes, where responses are kept): the same result on another machine must not rerun
the pipeline. Those come from the environment, see ``docs/running.md``.
"""

import importlib
import re
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from mllm_msr.core.errors import ParamsError

# Upper bounds are far above what makes sense, and far below what overflows or never ends.
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Width = Annotated[int, Field(ge=1, le=65_536)]  # of a vector
Depth = Annotated[int, Field(ge=1, le=1_000)]  # of a network, in layers
Epochs = Annotated[int, Field(ge=1, le=100_000)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
Tokens = Annotated[int, Field(ge=1, le=1_000_000)]  # no model has a longer context
Negatives = Annotated[int, Field(ge=1, le=1_000_000)]  # candidates beside a target
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what NumPy, torch and Cornac all take
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]  # 1 would drop everything
Rate = Annotated[float, Field(gt=0)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
Sampling = Literal["uniform", "popularity", "targets", "contemporary", "stratum"]
ModelName = Annotated[str, Field(min_length=1)]  # a folder, or a model of the hub
# Null leaves it to the chat template. Not in the repr, which identifies checkpoints of earlier
# releases: a system message is part of the model's identity there.
SystemMessage = Annotated[str | None, Field(repr=False)]
# Whether a model runs in the stage or behind a server; not in the repr, likewise.
Engine = Annotated[Literal["local", "server"], Field(repr=False)]


def _refuse_outside(path: str) -> str:
    """Refuse a path that leads out of the folder that it is relative to."""
    if path.startswith("/") or ".." in PurePosixPath(path).parts or path in {"", "."}:
        raise ValueError("it is a path below the folder of the raw files, without ..")
    return path


Name = Annotated[str, Field(min_length=1)]
PathBelow = Annotated[str, AfterValidator(_refuse_outside)]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads numbers as DVC does, and refuses a key that stands twice in a mapping.

    PyYAML's parser in C, where it was built with it, is ten times as fast as the one in Python.

    DVC reads and writes YAML 1.2, PyYAML reads 1.1: to it ``2e-05`` is a text, ``050`` is 40 and
    ``1:30`` is 90. Here the first is a number, and the others are texts that no number takes.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; PyYAML alone would keep the last of two equal keys.

        Raises:
            yaml.constructor.ConstructorError: A key stands twice.
        """
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                said = f"the key {key.value} twice"
                raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


# Tags whose implicit forms differ between YAML 1.1 and 1.2, with the forms they have here.
NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9]\d*)$",
    "tag:yaml.org,2002:float": r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in NUMBERS]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_form), list("-+.0123456789"))


class Section(BaseModel):
    """A section of ``params.yaml``; strict types, finite numbers, no unknown keys, no defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PocketWorldParams(Section):
    """The embedded world: how much of it, and which one."""

    seed: Seed
    users: Annotated[int, Field(ge=10, le=10_000_000)]
    items: Annotated[int, Field(ge=50, le=10_000_000)]


class AmazonParams(Section):
    """What is taken of Amazon Reviews; no other source looks here."""

    category: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z0-9_-]*$")]  # as in the files' names
    min_rating: Annotated[float, Field(ge=0, le=5)]  # stars; lower reviews are left out; 0 for none
    verified_only: bool  # leave out reviews without a verified purchase
    bad_records: Literal["error", "drop"]  # broken lines and fields of a wrong type
    text_length: Count  # characters of a title and of a description, after HTML is taken out
    image_size: Literal["hi_res", "large"]  # the one preferred; the other where it is missing


class MicroLensParams(Section):
    """What is taken of MicroLens; no other source looks here."""

    covers: Literal["required", "optional"]  # optional: without covers, items are text alone


class InteractionColumns(Section):
    """What a user's own file of interactions calls its columns."""

    user: Name
    item: Name
    timestamp: Name
    rating: Name  # read only where there is a min_rating


class ItemColumns(Section):
    """What a user's own file of items calls its columns."""

    item: Name
    title: Name
    description: Name  # the file may lack a column of this very name, and of the next
    image: Name


class TablesParams(Section):
    """How a user's own files are laid out; no other source looks here."""

    interactions_file: PathBelow | None  # null: interactions.csv, .tsv, .jsonl or .parquet
    items_file: PathBelow | None  # null: items.csv, .tsv, .jsonl or .parquet
    interaction_columns: InteractionColumns
    item_columns: ItemColumns
    timestamp_unit: Literal["milliseconds", "seconds", "iso8601"]
    min_rating: Annotated[float, Field(allow_inf_nan=False)] | None  # lower ones are left out
    image_pattern: PathBelow | None  # of an item's image, as images/{item}.jpg
    image_archive: PathBelow | None  # the zip that the pattern is looked for in; null: the folder

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.image_pattern is not None and self.image_pattern.count("{item}") != 1:
            raise ValueError("image_pattern has {item} once, in the place of an item's id")
        if self.image_archive is not None and self.image_pattern is None:
            raise ValueError("image_archive needs an image_pattern, such as images/{item}.jpg")
        return self


class PreprocessParams(Section):
    """From a publisher's files to the three tables."""

    source: Literal["pocket", "microlens", "amazon", "tables", "prepared"]
    unknown_items: Literal["error", "drop", "keep"]  # interactions whose item has no row
    allow_pocket_model: bool  # let the pocket world's model read data of another source
    microlens: MicroLensParams
    amazon: AmazonParams
    tables: TablesParams


class FetchImagesParams(Section):
    """From files and URLs to one table of small images."""

    image_side: Annotated[int, Field(ge=16, le=16_383)]  # pixels; longer side; WebP has no more
    failed_share: Share  # of the images, may fail to load; they are counted; 0: none may


class BudgetParams(Section):
    """How many sequences of each split are used; null: all."""

    train: Annotated[int, Field(ge=0, le=1_000_000_000)] | None  # 0: only without fine-tuning
    valid: Count | None
    test: Count | None
    interactions: Literal["all", "used"]  # that baselines and popularity learn from

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.train == 0 and self.interactions == "used":
            raise ValueError("interactions: used learns from training sequences, and train is 0")
        return self


class FilterSequencesParams(Section):
    """K-core, histories, targets, split, budgets and negative sampling."""

    min_user_interactions: Count
    min_item_interactions: Count
    min_history: Count
    max_history: Count
    history: Literal["recent", "popular"]
    target: Literal["last", "popular"]
    split: Literal["users", "leave_one_out", "time", "cold_items"]
    cold_share: Annotated[float, Field(gt=0, lt=1)]  # of items, withheld by the split cold_items
    valid_share: Share  # of users, or of time-ordered sequences; unused by leave_one_out
    test_share: Share
    fold: Annotated[int, Field(ge=0, le=1_000)] | None  # of users; null: the last of the shuffle
    budget: BudgetParams
    train_sampling: Sampling  # of negatives to train on and to choose an epoch by
    evaluation_sampling: Annotated[list[Sampling], Field(min_length=1)]  # a protocol each
    train_negatives: Negatives
    valid_negatives: Negatives
    test_negatives: Negatives
    seed: Seed

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.min_history > self.max_history:
            raise ValueError("min_history is larger than max_history")
        if self.target == "popular" and self.history == "recent":
            raise ValueError("target: popular needs history: popular (the authors' selection)")
        if self.fold is not None and self.split != "users":
            raise ValueError("fold needs split: users")
        if self.fold is not None and (self.fold + 1) * self.test_share > 1 + 1e-9:
            raise ValueError("fold is beyond the last: there are 1 / test_share folds")
        if self.split == "cold_items" and self.target == "popular":
            raise ValueError("split: cold_items needs target: last")
        if self.split == "cold_items" and not self.test_share:
            raise ValueError("split: cold_items needs a test_share above 0")
        if self.valid_share + self.test_share >= 1:
            raise ValueError("valid_share and test_share leave nothing to train on")
        if len(set(self.evaluation_sampling)) < len(self.evaluation_sampling):
            raise ValueError("evaluation_sampling names one twice")
        return self


class SummarizeItemsParams(Section):
    """How an item's text and image become one summary (paper, section Method, step 1)."""

    model: ModelName | None  # null leaves the stage out, unless texts alone are copied
    revision: str | None
    engine: Engine
    system_message: SystemMessage
    text: Literal["model", "raw", "none"]  # summarized, copied, or not read
    image: bool
    fusion: Literal["model", "concat"]
    max_new_tokens: Tokens  # tokens of each of the three responses
    missing: Literal["describe", "error"]  # an item without title or without image

    @field_validator("text", mode="before")
    @classmethod
    def _refuse_old_values(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("true is now model, false is now none; raw copies the text")
        return value

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.text == "none" and not self.image:
            raise ValueError("text is none and image false: nothing is left to summarize")
        return self

    @property
    def copies_texts(self) -> bool:
        """Whether summaries are the items' texts as they are, so that no model is needed."""
        return self.text == "raw" and not self.image


class EncodeItemsParams(Section):
    """The model whose vision tower and language model give an item's features."""

    model: ModelName | None  # null leaves the stage out: its table is empty
    revision: str | None


class InferPreferencesParams(Section):
    """How a history becomes a preference text (paper, section Method, step 2)."""

    model: ModelName | None  # null leaves the stage out; the mode none asks no model
    revision: str | None
    engine: Engine
    system_message: SystemMessage
    mode: Literal["recurrent", "direct", "none"]
    block_size: Count  # items per block; only the recurrent mode has blocks
    max_new_tokens: Tokens


class RecommenderParams(Section):
    """The model that answers yes or no, shared by training and scoring."""

    model: ModelName | None  # null leaves both stages out
    revision: str | None
    engine: Engine  # of scoring; training is always local
    system_message: SystemMessage
    four_bit: bool  # QLoRA: the frozen language model in 4 bits
    image: bool  # whether the candidate's image is shown
    max_prompt_tokens: Tokens  # the longest field is shortened, and counted, until it fits


class LoraParams(Section):
    """Low-rank adaptation of the language layers."""

    rank: Width
    alpha: Width
    dropout: Dropout
    layers: list[str]  # names of linear layers inside the language model


class SftParams(Section):
    """Supervised fine-tuning (paper, section Method, step 3)."""

    lora: LoraParams
    loss: Literal["yes_no", "listwise"]  # pair by pair, or the target among its candidates
    epochs: Annotated[int, Field(ge=0, le=100_000)]  # 0 is the zero-shot variant
    learning_rate: LearningRate
    schedule: Literal["linear", "cosine", "constant_with_warmup"]
    warmup_share: Annotated[float, Field(ge=0, lt=1)]  # of all optimizer steps
    batch_size: BatchSize  # pairs per forward
    accumulation: BatchSize  # forwards per optimizer step
    max_gradient_norm: Rate
    select_by: Literal["auc", "loss"]  # the epoch kept, measured on validation sequences
    validation_sequences: Count  # at most so many, a seeded sample
    seed: Seed

    def by_steps(self) -> Self:
        """Return the settings with all pairs of an optimizer step in one batch.

        Where a batch was too large for the memory, smaller ones go on from the same checkpoints.
        """
        pairs = self.batch_size * self.accumulation
        return self.model_copy(update={"batch_size": pairs, "accumulation": 1})


class BaselineStageParams(Section):
    """Baselines of one stage: which are run, and the settings of each under its name.

    A baseline declares its settings in its own file (:mod:`mllm_msr.baselines.discovery`). They are
    fields of a subclass that :meth:`complete` makes, and checked like all others.
    """

    stage: ClassVar[str]
    is_complete: ClassVar[bool] = False

    models: list[str]  # those that are run

    @model_validator(mode="wrap")
    @classmethod
    def _validate_baselines(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if cls.is_complete or isinstance(values, cls):
            return validate(values)
        return cls.complete(values).model_validate(values)

    @model_validator(mode="after")
    def _refuse_unknown_models(self) -> Self:
        unknown = [model for model in self.models if model not in self._names()]
        if unknown:
            raise ValueError(f"models are among {', '.join(self._names())}; got {unknown[0]!r}")
        if len(set(self.models)) < len(self.models):
            raise ValueError("models names one twice")
        return self

    @classmethod
    def complete(cls, values: Any) -> type[Self]:
        """Return a subclass with a field for each baseline of the stage, in the order of a file.

        Args:
            values: What the file says, in its order; baselines that it lacks come last.
        """
        # Only validates settings. The import is dynamic, so that the files of all baselines are no
        # dependency of every stage: none but a baseline's own stage depends on its settings.
        discovery = importlib.import_module("mllm_msr.baselines.discovery")
        declared = {each.name: each.params for each in discovery.baselines_of(cls.stage)}
        written = [name for name in values if name in declared] if isinstance(values, dict) else []
        names = dict.fromkeys([*written, *declared])
        return _add_fields(cls, tuple((name, declared[name]) for name in names))

    def of(self, model: str) -> Section:
        """Return the settings of one baseline.

        Raises:
            ParamsError: There is no such baseline.
        """
        if model not in self._names():
            names = ", ".join(self._names())
            raise ParamsError(
                expected=f"one of {names}",
                got=repr(model),
                where="the baseline",
                fix="correct its name",
            )
        settings: Section = getattr(self, model)
        return settings

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in cls.model_fields if name != "models"]


AnyStageParams = TypeVar("AnyStageParams", bound=BaselineStageParams)


@cache
def _add_fields(
    section: type[AnyStageParams], fields: tuple[tuple[str, type[Section]], ...]
) -> type[AnyStageParams]:
    """Return a subclass of a section with more fields."""
    definitions: dict[str, Any] = {name: (params, ...) for name, params in fields}
    model = create_model(
        section.__name__, __base__=section, __module__=section.__module__, **definitions
    )
    model.is_complete = True
    return model


class BaselinesParams(BaselineStageParams):
    """Baselines that learn from interactions; one compares titles."""

    stage = "baselines"


class FeatureBaselinesParams(BaselineStageParams):
    """Baselines that learn from interactions and item features."""

    stage = "feature_baselines"


class TextBaselinesParams(BaselineStageParams):
    """Baselines that compare generated texts; nothing is trained."""

    stage = "text_baselines"


class RetrieveParams(Section):
    """The first stage of the evaluation on the whole catalogue, and how much it proposes."""

    retriever: Name | None  # popularity, or a baseline; null leaves the stage out
    candidates: Annotated[int, Field(ge=2, le=1_000_000)]  # items that a retriever proposes

    @field_validator("retriever")
    @classmethod
    def _refuse_unknown_retrievers(cls, value: str | None) -> str | None:
        discovery = importlib.import_module("mllm_msr.baselines.discovery")  # as in complete()
        names = ["popularity", *(each.name for each in discovery.all_baselines())]
        if value is not None and value not in names:
            raise ValueError(f"a retriever is null or one of {', '.join(names)}")
        return value


class EvaluateParams(Section):
    """Metrics and their intervals."""

    ks: Annotated[list[Count], Field(min_length=1)]  # HR@k, NDCG@k, MRR@k; curves to the largest
    bootstrap_samples: Annotated[int, Field(ge=1, le=1_000_000)]  # resamples of the sequences
    confidence: Annotated[float, Field(gt=0, lt=1)]  # coverage of the intervals
    seed: Seed
    calibration: Literal["none", "temperature", "platt"]  # of p(yes), on validation candidates

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if sorted(set(self.ks)) != self.ks:
            raise ValueError("ks must ascend without repetition")
        return self


class ReportParams(Section):
    """The page that shows a run."""

    # What a user's own tables are called; only for preprocess.source: tables.
    dataset: str | None
    # Of each kind at most: target ranked first, target not ranked first.
    stories: Annotated[int, Field(ge=0, le=1_000)]
    thumbnail_side: Annotated[int, Field(ge=16, le=512)]  # pixels; longer side
    groups: Annotated[int, Field(ge=1, le=12)]  # of test sequences, at most, by each property
    seed: Seed  # of the choice of stories


class Params(Section):
    """The whole of ``params.yaml``: a section per stage, and one that two stages share."""

    pocket_world: PocketWorldParams
    preprocess: PreprocessParams
    filter_sequences: FilterSequencesParams
    fetch_images: FetchImagesParams
    summarize_items: SummarizeItemsParams
    encode_items: EncodeItemsParams
    infer_preferences: InferPreferencesParams
    recommender: RecommenderParams
    sft: SftParams
    baselines: BaselinesParams
    feature_baselines: FeatureBaselinesParams
    text_baselines: TextBaselinesParams
    retrieve: RetrieveParams
    evaluate: EvaluateParams
    report: ReportParams

    @property
    def models(self) -> dict[str, str | None]:
        """The model of each role by its setting; None where the stage is left out."""
        return {
            "summarize_items.model": self.summarize_items.model,
            "encode_items.model": self.encode_items.model,
            "infer_preferences.model": self.infer_preferences.model,
            "recommender.model": self.recommender.model,
        }


SECTIONS: dict[str, Any] = {name: field.annotation for name, field in Params.model_fields.items()}

# Sections and keys that had another name, and what they are now; see CHANGELOG.md.
RENAMED = {
    "filter_sequences.negatives": "train_sampling and evaluation_sampling",
}

AnySection = TypeVar("AnySection", bound=Section)


def load_params(section: type[AnySection], path: Path = Path("params.yaml")) -> AnySection:
    """Read one section of a params file, and check the others that it has.

    A typo in the last stage's settings is then found before the first stage's work.

    Args:
        section: The section's model, one of the values of :data:`SECTIONS`.
        path: The YAML file.

    Raises:
        ParamsError: The file or the section is missing; or in any section a key is unknown, missing
            or there twice, or its value is of the wrong type or out of range; or a stage is left
            out that another one needs.
    """
    name = next(key for key, model in SECTIONS.items() if model is section)
    document = read_yaml(path)
    _refuse_unknown_sections(document, path)
    settings: AnySection = _check_section(document, name, path)
    for other in [key for key in SECTIONS if key in document and key != name]:
        _check_section(document, other, path)
    _refuse_missing_models(document, path)
    _refuse_empty_training(document, path)
    return settings


def load_all_params(path: Path = Path("params.yaml")) -> Params:
    """Read the whole of a params file.

    Raises:
        ParamsError: As :func:`load_params`.
    """
    return check_params(read_yaml(path), path)


def check_params(document: dict[str, Any], path: Path) -> Params:
    """Return the settings of a document, all sections checked.

    Args:
        document: What the whole of a params file says.
        path: The file that errors name.

    Raises:
        ParamsError: As :func:`load_params`, of the first section that is not as it should be.
    """
    _refuse_unknown_sections(document, path)
    sections = {name: _check_section(document, name, path) for name in SECTIONS}
    _refuse_missing_models(document, path)
    _refuse_empty_training(document, path)
    return Params(**sections)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ParamsError: The file is missing, not YAML, or not a mapping.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError as error:
        raise ParamsError(
            expected="a file", got="none", where=str(path), fix="run from the project's folder"
        ) from error
    except UnicodeDecodeError as error:
        raise ParamsError(
            expected="valid YAML", got=str(error), where=str(path), fix="correct the syntax"
        ) from error


def parse_yaml(text: str, path: Path) -> dict[str, Any]:
    """Parse a YAML mapping.

    Args:
        text: The YAML.
        path: The file that errors name.

    Raises:
        ParamsError: The text is not YAML, or not a mapping.
    """
    try:
        document = yaml.load(text, _Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError) as error:  # the second of a date or number beyond bounds
        raise ParamsError(
            expected="valid YAML", got=str(error), where=str(path), fix="correct the syntax"
        ) from error
    if not isinstance(document, dict):
        raise ParamsError(
            expected="sections", got=type(document).__name__, where=str(path), fix="see params.yaml"
        )
    return document


def _refuse_unknown_sections(document: dict[str, Any], path: Path) -> None:
    unknown = sorted(_say_renamed(str(name)) for name in document if name not in SECTIONS)
    if unknown:
        raise ParamsError(
            expected=f"sections {', '.join(SECTIONS)}",
            got=f"unknown section {', '.join(unknown)}",
            where=str(path),
            fix="correct or remove it",
        )


def _refuse_missing_models(document: dict[str, Any], path: Path) -> None:
    """Refuse settings that leave a stage out and run another one on its empty table.

    Read only the model settings; types and keys are checked with each section.
    """

    def value(section: str, key: str) -> Any:
        keys = document.get(section)
        return keys.get(key, ...) if isinstance(keys, dict) else ...

    no_titles = value("infer_preferences", "mode") != "none"  # which reads no summary
    copied = value("summarize_items", "text") == "raw" and not value("summarize_items", "image")
    needs = (
        (
            "summarize_items",
            "infer_preferences.model reads the summaries",
            value("infer_preferences", "model") is not None and no_titles and not copied,
            "infer_preferences.model to null, or infer_preferences.mode to none, or"
            " summarize_items.text to raw and image to false",
        ),
        (
            "infer_preferences",
            "recommender.model reads the preferences",
            value("recommender", "model") is not None and no_titles,
            "recommender.model to null, or infer_preferences.mode to none",
        ),
        (
            "encode_items",
            "feature_baselines.models read the vectors",
            value("feature_baselines", "models") not in ([], ...),
            "feature_baselines.models to []",
        ),
    )
    for section, reader, reads, otherwise in needs:
        if reads and value(section, "model") is None:
            expected, where = f"a model, since {reader}", f"{path}, {section}.model"
            raise ParamsError(
                expected=expected, got="null", where=where, fix=f"set one, or set {otherwise}"
            )


def _refuse_empty_training(document: dict[str, Any], path: Path) -> None:
    """Refuse fine-tuning without training or validation sequences; read checked sections only."""
    filters, sft = document.get("filter_sequences"), document.get("sft")
    recommender = document.get("recommender")
    if not (filters and sft and recommender):
        return
    trained = recommender["model"] is not None and sft["epochs"]
    if trained and filters["budget"]["train"] == 0:
        raise ParamsError(
            expected=f"training sequences, since sft.epochs is {sft['epochs']}",
            got="0",
            where=f"{path}, filter_sequences.budget.train",
            fix="raise it, or set sft.epochs to 0",
        )
    retrieve = document.get("retrieve") or {"retriever": None}
    reranked = recommender["model"] is not None and retrieve["retriever"]
    if filters["valid_share"] == 0 and filters["split"] != "leave_one_out":
        for needed, what, setting in (
            (trained, "by which sft chooses an epoch", "sft.epochs to 0"),
            (reranked, "by which rankings are fused", "retrieve.retriever to null"),
        ):
            if needed:
                raise ParamsError(
                    expected=f"validation sequences, {what}",
                    got="0",
                    where=f"{path}, filter_sequences.valid_share",
                    fix=f"raise it, or set {setting}",
                )


def _check_section(document: dict[str, Any], name: str, path: Path) -> Any:
    """Read one section of a document."""
    if name not in document:
        raise ParamsError(
            expected=f"a section {name}", got="none", where=str(path), fix="add it, see params.yaml"
        )
    section, values = SECTIONS[name], document[name]
    if issubclass(section, BaselineStageParams):
        section = section.complete(values)
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise _explain(error, section, name, path) from error


def _explain(error: ValidationError, section: type[Section], name: str, path: Path) -> ParamsError:
    """Turn pydantic's report into one line that names each key."""
    unknown, missing, wrong = [], [], []
    for problem in error.errors():
        key = ".".join([name, *(str(part) for part in problem["loc"])])
        if problem["type"] == "extra_forbidden":
            unknown.append(_say_renamed(key))
        elif problem["type"] == "missing":
            missing.append(key)
        else:
            is_section = isinstance(problem["input"], dict)  # the message says what is wrong in it
            value = "" if is_section else f" = {problem['input']!r}"
            wrong.append(f"{key}{value} ({problem['msg']})")
    got = [
        f"{label} {', '.join(keys)}"
        for label, keys in (("unknown", unknown), ("missing", missing), ("invalid", wrong))
        if keys
    ]
    keys = ", ".join(section.model_fields)
    return ParamsError(
        expected=f"the keys {keys}",
        got="; ".join(got),
        where=f"{path}, {name}",
        fix="correct them",
    )


def _say_renamed(key: str) -> str:
    """Return an unknown key with its new name, where it has one."""
    return f"{key} (now {RENAMED[key]})" if key in RENAMED else key
