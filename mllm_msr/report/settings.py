"""The settings of a run: the protocol in words, and the list of all settings."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mllm_msr.core.params import (
    EncodeItemsParams,
    InferPreferencesParams,
    Params,
    RecommenderParams,
    SummarizeItemsParams,
)
from mllm_msr.evaluation.metrics import choose_cutoff

Role = SummarizeItemsParams | InferPreferencesParams | RecommenderParams | EncodeItemsParams


class Settings(Params):
    """Every section of ``params.yaml``, and what the report derives from them."""

    @property
    def pocket(self) -> bool:
        """Whether the data are the embedded world's."""
        return self.preprocess.source == "pocket"

    @property
    def dataset(self) -> str:
        """Name of the dataset in text."""
        category = self.preprocess.amazon.category.replace("_", " ")
        names = {"pocket": "the pocket world", "microlens": "MicroLens"}
        own = self.report.dataset or "own tables"
        names |= {"amazon": f"Amazon {category}", "tables": own, "prepared": own}
        return names.get(self.preprocess.source, self.preprocess.source)

    @property
    def k(self) -> int:
        """The cut-off of tables."""
        return choose_cutoff(self.evaluate.ks)


class Fact(NamedTuple):
    """A paragraph of the protocol, which readers need to judge a figure."""

    name: str
    text: str


HISTORIES = {"recent": "the most recent", "popular": "a user's globally most popular"}
TARGETS = {
    "last": "the user's last item",
    "popular": "the last of the user's globally most popular items, as the paper's code has it:"
    " targets are chosen by popularity and negatives are not, so a score that only counts"
    " popularity does well here",
}
SPLITS = {
    "users": "at random by users",
    "leave_one_out": "by time within each user (leave one out)",
    "time": "by time over all users",
    "cold_items": "at random by users; some items are withheld from training, and users whose last"
    " item is one of them are in validation and test",
}
NEGATIVES = {
    "uniform": "uniformly",
    "popularity": "by popularity",
    "targets": "from other users' targets of the same split, by how often they are one",
    "contemporary": "uniformly from items that had appeared by the target's time",
    "stratum": "from other users' targets of the same split that are as cold, rare or warm as the"
    " target",
}
CANDIDATES = {  # names of the samplings in text
    "uniform": "uniform negatives",
    "popularity": "negatives drawn by popularity",
    "targets": "negatives drawn from other users' targets",
    "contemporary": "negatives that had appeared by the target's time",
    "stratum": "negatives drawn from other users' targets of the same stratum",
}
MODES = {
    "direct": "The whole history is read in one prompt.",
    "none": "No preference is inferred; the recommender reads the titles of the history.",
}
LOSSES = {"yes_no": "yes/no, pair by pair", "listwise": "the target among its candidates"}


def state_protocol(settings: Settings, scored: bool) -> list[Fact]:
    """Describe the protocol in words: the question, the data, the models and the baselines.

    Args:
        settings: Of the run.
        scored: Whether there are scores of the model; if not, its training is left out.
    """
    filters, inferred = settings.filter_sequences, settings.infer_preferences
    drawn = " and, separately, ".join(NEGATIVES[each] for each in filters.evaluation_sampling)
    recurrent = f"The history is read in blocks of {inferred.block_size}, each with the preference"
    facts = [
        Fact(
            "Question",
            "Would this user take this item next? Each test sequence has one target among"
            f" {filters.test_negatives:,} negatives, items that the user never took, drawn"
            f" {drawn}. Figures compare scorers on these candidates; they are not"
            " full-catalogue metrics.",
        ),
        Fact(
            "Target and history",
            f"The target is {TARGETS[filters.target]}; the history holds {filters.min_history} to"
            f" {filters.max_history} items, {HISTORIES[filters.history]}.",
        ),
        Fact("Split", f"Train, validation and test are split {SPLITS[filters.split]}."),
    ]
    if scored:
        preference = MODES.get(inferred.mode, f"{recurrent} before it.")
        facts += [Fact("Preference", preference), Fact("Training", _state_training(settings))]
    facts.append(Fact("Baselines", _state_baselines(settings)))
    models = _state_models(settings, scored)
    return [*facts, Fact("Models", models)] if models else facts


def list_sections(settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each section that this run used, with its keys joined by dots."""
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
    filters = settings.filter_sequences
    sections = (settings.baselines, settings.feature_baselines, settings.text_baselines)
    if not any(section.models for section in sections):
        return "None, but for popularity."
    known = (
        "from everything that happened before the first held-out target"
        if filters.split == "time"
        else "from everything that users took, and of users with a held-out target from what came"
        " before it"
    )
    text = f"They rank the same candidates by the same histories, and learn {known}."
    if "popular" in (filters.history, filters.target):
        text += (
            " They are trained on whole logs, the recommender on sequences chosen by popularity, as"
            " the test sequences are."
        )
    return text


def _state_models(settings: Settings, scored: bool) -> str:
    """Name the models and what each does; empty if there is none."""
    roles: dict[str, Role] = {}
    if scored:
        roles = {
            "summaries": settings.summarize_items,
            "preferences": settings.infer_preferences,
            "recommender": settings.recommender,
        }
    if settings.feature_baselines.models:
        roles["vectors of items"] = settings.encode_items
    if settings.summarize_items.copies_texts:
        roles.pop("summaries", None)
    used = {name: role for name, role in roles.items() if getattr(role, "mode", "") != "none"}
    named: dict[str, list[str]] = {}
    for name, role in used.items():
        if role.model is None:
            continue
        model = role.model + (f" at {role.revision}" if role.revision else "")
        named.setdefault(model, []).append(name)
    text = "; ".join(f"{model} ({', '.join(names)})" for model, names in named.items())
    return f"{text}." if text else ""


def _flatten(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield above + key, _show(value)


def _show(value: Any) -> str:
    """Format a value as YAML does."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
