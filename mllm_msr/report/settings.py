"""The settings of a run: in words what decides the result, and as a list all there are."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mllm_msr.core.params import (
    EncodeItemsParams,
    InferPreferencesParams,
    Params,
    RecommenderParams,
    SummarizeItemsParams,
)

Role = SummarizeItemsParams | InferPreferencesParams | RecommenderParams | EncodeItemsParams


class Settings(Params):
    """Every section of ``params.yaml``, and what the report derives from them."""

    @property
    def pocket(self) -> bool:
        """Whether the data are the embedded world's."""
        return self.preprocess.source == "pocket"

    @property
    def dataset(self) -> str:
        """What the dataset is called."""
        category = self.preprocess.amazon.category.replace("_", " ")
        names = {"pocket": "the pocket world", "microlens": "MicroLens"}
        names |= {"amazon": f"Amazon {category}", "tables": self.report.dataset or "own tables"}
        return names.get(self.preprocess.source, self.preprocess.source)

    @property
    def models(self) -> dict[str, str | None]:
        """The model of each role by its setting; None where the stage is left out."""
        return {
            "summarize_items.model": self.summarize_items.model,
            "encode_items.model": self.encode_items.model,
            "infer_preferences.model": self.infer_preferences.model,
            "recommender.model": self.recommender.model,
        }

    @property
    def k(self) -> int:
        """The cut-off of tables: 5, the paper's, or the smallest there is."""
        ks = self.evaluate.ks
        return 5 if 5 in ks else ks[0]


class Fact(NamedTuple):
    """What a reader must know to judge a figure."""

    name: str
    text: str


HISTORIES = {"recent": "the most recent", "popular": "a user's globally most popular"}
TARGETS = {
    "last": "the user's true last item",
    "popular": "the last of the user's globally most popular items, as the paper's code has it:"
    " the target is chosen for its popularity and the negatives are not, so a score that only"
    " counts popularity does well here",
}
SPLITS = {
    "users": "at random by users",
    "leave_one_out": "by time within each user (leave one out)",
    "time": "by time over all users",
}
NEGATIVES = {
    "uniform": "uniformly",
    "popularity": "by popularity",
    "targets": "from other users' targets of the same split, by how often they are one",
    "contemporary": "uniformly from items that had appeared by the target's time",
}
CANDIDATES = {  # what a candidate list is called by its sampling
    "uniform": "uniform negatives",
    "popularity": "negatives drawn by popularity",
    "targets": "negatives drawn from other users' targets",
    "contemporary": "negatives that had appeared by the target's time",
}
MODES = {
    "direct": "The whole history is read in one prompt.",
    "none": "No preference is inferred; the recommender reads the titles of the history.",
}
LOSSES = {"yes_no": "yes/no, pair by pair", "listwise": "the target among its candidates"}


def state_protocol(settings: Settings, scored: bool) -> list[Fact]:
    """Say in words what is asked, of whom, by which models.

    Args:
        settings: Of the run.
        scored: Whether there are scores of the model; without, nothing is said of its making.
    """
    asked, inferred = settings.filter_sequences, settings.infer_preferences
    drawn = " and, apart, ".join(NEGATIVES[each] for each in asked.evaluation_sampling)
    recurrent = f"The history is read in blocks of {inferred.block_size}, each with the preference"
    facts = [
        Fact(
            "Question",
            "Would this user take this item next? Each test sequence asks about one target among"
            f" {asked.test_negatives:,} negatives, items that the user never took, drawn"
            f" {drawn}. Figures compare scorers on these candidates; they are not"
            " full-catalogue metrics.",
        ),
        Fact(
            "Target and history",
            f"The target is {TARGETS[asked.target]}; the history holds {asked.min_history} to"
            f" {asked.max_history} items, {HISTORIES[asked.history]}.",
        ),
        Fact("Split", f"Train, validation and test are split {SPLITS[asked.split]}."),
    ]
    if scored:
        preference = MODES.get(inferred.mode, f"{recurrent} before it.")
        facts += [Fact("Preference", preference), Fact("Training", _state_training(settings))]
    facts.append(Fact("Baselines", _state_baselines(settings)))
    models = _state_models(settings, scored)
    return [*facts, Fact("Models", models)] if models else facts


def list_sections(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each section that this run used, with its keys joined by dots."""
    for name, section in settings:
        if name != "pocket_world" or settings.pocket:
            yield name, dict(_flatten(section.model_dump()))


def _state_training(settings: Settings) -> str:
    sft = settings.sft
    if not sft.epochs:
        return "None: the recommender is used zero-shot."
    measure = {"auc": "AUC", "loss": "loss"}[sft.select_by]
    return (
        f"LoRA of rank {sft.lora.rank}, at most {sft.epochs} epochs at a rate of"
        f" {sft.learning_rate:g}; loss: {LOSSES[sft.loss]}; the epoch that is best on validation"
        f" sequences by {measure} is kept."
    )


def _state_baselines(settings: Settings) -> str:
    asked = settings.filter_sequences
    sections = (settings.baselines, settings.feature_baselines, settings.text_baselines)
    if not any(section.models for section in sections):
        return "None, but for popularity."
    known = (
        "from everything that happened before the first held-out target"
        if asked.split == "time"
        else "from everything that users took, of those with a held-out target what came before it"
    )
    told = f"They rank the same candidates by the same histories, and learn {known}."
    if "popular" in (asked.history, asked.target):
        told += (
            " Their sequences are whole logs; those that are asked about are chosen by popularity,"
            " which is what the recommender was trained on and they were not."
        )
    return told


def _state_models(settings: Settings, scored: bool) -> str:
    """Name the models and what each does; empty where there is none."""
    roles: dict[str, Role] = {}
    if scored:
        roles = {
            "summaries": settings.summarize_items,
            "preferences": settings.infer_preferences,
            "recommender": settings.recommender,
        }
    if settings.feature_baselines.models:
        roles["vectors of items"] = settings.encode_items
    used = {name: role for name, role in roles.items() if getattr(role, "mode", "") != "none"}
    named: dict[str, list[str]] = {}
    for name, role in used.items():
        if role.model is None:
            continue
        model = role.model + (f" at {role.revision}" if role.revision else "")
        named.setdefault(model, []).append(name)
    told = "; ".join(f"{model} ({', '.join(names)})" for model, names in named.items())
    return f"{told}." if told else ""


def _flatten(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield above + key, _show(value)


def _show(value: Any) -> str:
    """Write a value as YAML has it."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
