"""Declarations of the studies: their experiments, and the settings that vary between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mllm_msr.core.errors import ParamsError
from mllm_msr.evaluation.scorers import MODEL, label_of

PARAMS = "params.yaml"
STUDIES = (
    *("table", "ablation", "block-size", "summary-length", "image-summary", "loss", "seeds"),
    *("cold-items", "folds", "learning-curve", "full-ranking"),
)
POCKET_LENGTHS = (8, 16, 24, 32, 48)  # tokens
REAL_LENGTHS = (50, 100, 150, 200, 250)  # tokens; the paper's values are not known
BUDGETS = (64, 256, 1024)  # training sequences
POCKET_CANDIDATES = 30  # of each retriever: minutes on a CPU; other data have those of the settings
LEARNERS = ("sasrec", "gru4rec_f")  # rows of the learning curve beside the model, where named


@dataclass(frozen=True)
class Variant:
    """One experiment of a study.

    Attributes:
        name: Part of the experiment's name.
        label: Its name in tables and figures.
        settings: Changes to ``params.yaml``: values by section and key, joined by a dot.
        scorers: Labels of the scorers that are shown; only the model if empty.
        group: Group of the main table.
    """

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    scorers: Mapping[str, str] = field(default_factory=dict)
    group: str = ""

    def shown(self) -> Mapping[str, str]:
        """Return the labels of its rows by scorer."""
        return self.scorers or {MODEL: self.label}


@dataclass(frozen=True)
class Study:
    """A series of experiments.

    Attributes:
        name: As on the command line.
        about: Its question, in one line.
        variants: Its experiments. The others are tested against the first, or in a sweep against
            the one with the settings in ``params.yaml``.
        kind: Rows that are compared, values of one setting, repetitions of one experiment,
            folds of the users, values of one setting for several scorers, untested, or retrievers
            of the whole catalogue, each with rows of its own (:mod:`mllm_msr.study.full_ranking`).
        varied: Name of what varies, in tables and figures.
        others: Which other scorers are rows of the table: all, or the simple ones.
        idle: A setting and its values under which nothing would vary.
        strata: Whether AUC by the stratum of the target is shown too.
    """

    name: str
    about: str
    variants: tuple[Variant, ...]
    kind: Literal["rows", "sweep", "repetitions", "folds", "curves", "retrievers"] = "rows"
    varied: str = "variant"
    others: Literal["all", "simple"] = "simple"
    idle: tuple[str, tuple[Any, ...]] = ("", ())
    strata: bool = False


NO_SFT = {"sft.epochs": 0}

ABLATION = Study(
    "ablation",
    "What each part contributes: the method without one part at a time.",
    (
        Variant("full", "full"),
        Variant("direct", "R: direct preference", {"infer_preferences.mode": "direct"}),
        Variant("no-image-summaries", "I: no image summaries", {"summarize_items.image": False}),
        Variant("no-preference", "no preference, titles", {"infer_preferences.mode": "none"}),
        Variant("no-sft", "no fine-tuning", NO_SFT),
        Variant("no-candidate-image", "no candidate image", {"recommender.image": False}),
    ),
)

IMAGE_SUMMARY = Study(
    "image-summary",
    "Is a summary as good as the image? GRU4Rec on vision features and on summaries.",
    (
        Variant(
            "gru4rec",
            "GRU4Rec",
            {"feature_baselines.models": ["gru4rec_image", "gru4rec_summary"]},
            {"gru4rec_image": "GRU4Rec on images", "gru4rec_summary": "GRU4Rec on summaries"},
        ),
    ),
    varied="features",
)

LOSS = Study(
    "loss",
    "Does a loss over a list of candidates pay? Yes/no and listwise, on the same negatives.",
    (Variant("yes-no", "yes/no"), Variant("listwise", "listwise", {"sft.loss": "listwise"})),
    varied="loss",
    idle=("sft.epochs", (0,)),
)


COLD_ITEMS = Study(
    "cold-items",
    "Items without interactions: every row where a share of the items is withheld from training.",
    (
        Variant(
            "withheld",
            MODEL,
            {
                "filter_sequences.split": "cold_items",
                "filter_sequences.evaluation_sampling": ["stratum", "targets"],
            },
            group="ours",
        ),
    ),
    varied="scorer",
    others="all",
    strata=True,
)


def plan_table(text_model: str | None = None, revision: str | None = None) -> Study:
    """Plan the main table: MLLM-MSR, other LLMs and all baselines.

    Args:
        text_model: Model of TALLRec's row; None is the recommender's model, without images.
        revision: Its commit, if it is a model of a hub.

    Raises:
        ParamsError: There is a revision without a model.
    """
    if revision and not text_model:
        expected, fix = "--text-model beside --text-revision", "name the model too"
        raise ParamsError(expected=expected, got="none", where="study table", fix=fix)
    titles = {"infer_preferences.mode": "none", "recommender.image": False}
    if text_model:
        titles |= {"recommender.model": text_model, "recommender.revision": revision}
    return Study(
        "table",
        "The main table: MLLM-MSR beside other LLMs, baselines, popularity and chance.",
        (
            Variant("full", MODEL, group="ours"),
            Variant("zero-shot", "MLLM, no fine-tuning", NO_SFT, group="LLM"),
            Variant("tallrec", "TALLRec's recipe: titles only, fine-tuned", titles, group="LLM"),
        ),
        varied="scorer",
        others="all",
    )


def plan_block_size() -> Study:
    """Plan the study of the number of items in a block."""
    about = "How many items to a block of the recurrent preference: 1 to 5."
    key, idle = "infer_preferences.block_size", ("infer_preferences.mode", ("direct", "none"))
    return _sweep("block-size", about, "items per block", key, range(1, 6), idle)


def plan_summary_length(values: Sequence[int]) -> Study:
    """Plan the study of the greatest length of a preference, in tokens."""
    about = f"How long the preference may be: {', '.join(map(str, values))} tokens."
    key, idle = "infer_preferences.max_new_tokens", ("infer_preferences.mode", ("none",))
    return _sweep("summary-length", about, "tokens of a preference", key, values, idle)


def plan_seeds(first: int, count: int) -> Study:
    """Plan repetitions of the fine-tuning with seeds ``first``, ``first + 1`` and so on."""
    seeds = range(first, first + count)
    about = f"How much the seed of the fine-tuning moves the figures: {', '.join(map(str, seeds))}."
    variants = tuple(Variant(str(seed), f"seed {seed}", {"sft.seed": seed}) for seed in seeds)
    idle = ("sft.epochs", (0,))
    return Study("seeds", about, variants, kind="repetitions", varied="run", idle=idle)


def plan_folds(params: Mapping[str, Any], count: int) -> Study:
    """Plan one experiment per fold of users: ID-based and feature baselines, without the model.

    Args:
        params: Settings of the workspace, which name the baselines.
        count: Number of folds; each user is tested in exactly one.
    """
    models = [
        *look_up(params, "baselines.models"),
        *look_up(params, "feature_baselines.models"),
    ]
    names = (*models, "target_popularity", "popularity", "chance")
    scorers = {name: label_of(name) for name in names}
    without_model: dict[str, Any] = {
        "infer_preferences.model": None,
        "recommender.model": None,
        "text_baselines.models": [],
    }
    variants = tuple(
        Variant(
            str(fold),
            f"fold {fold}",
            {"filter_sequences.fold": fold, "filter_sequences.test_share": 1 / count}
            | without_model,
            scorers,
        )
        for fold in range(count)
    )
    about = f"How far the choice of test users moves the figures: {count} folds, each user in one."
    idle = ("filter_sequences.split", ("leave_one_out", "time", "cold_items"))
    return Study("folds", about, variants, kind="folds", varied="scorer", idle=idle)


def plan_learning_curve(params: Mapping[str, Any], values: Sequence[int]) -> Study:
    """Plan training on few sequences: the model, and baselines that learn from the same ones.

    The first experiment is the model without fine-tuning. Baselines have no row there: without a
    known interaction there is nothing to learn.

    Args:
        params: Settings of the workspace, which name the baselines.
        values: Numbers of training sequences, ascending.
    """
    named = [*look_up(params, "baselines.models"), *look_up(params, "feature_baselines.models")]
    scorers = {name: label_of(name) for name in (MODEL, *LEARNERS) if name in (MODEL, *named)}
    few = tuple(
        Variant(
            str(value),
            str(value),
            {
                "filter_sequences.budget.train": value,
                "filter_sequences.budget.interactions": "used",
            },
            scorers,
        )
        for value in values
    )
    none = Variant("0", "0", NO_SFT, {MODEL: label_of(MODEL)})
    about = f"How many training sequences it takes: 0, {', '.join(map(str, values))}."
    idle = ("sft.epochs", (0,))
    varied = "training sequences"
    return Study("learning-curve", about, (none, *few), kind="curves", varied=varied, idle=idle)


def plan_full_ranking(params: Mapping[str, Any]) -> Study:
    """Plan the ranking of the whole catalogue: one experiment for each first-stage retriever.

    Args:
        params: Settings of the workspace, which name the baselines.
    """
    named = [*look_up(params, "baselines.models"), *look_up(params, "feature_baselines.models")]
    learned = [name for name in reversed(LEARNERS) if name in named][:1]
    pocket = look_up(params, "preprocess.source") == "pocket"
    shared = {"retrieve.candidates": POCKET_CANDIDATES} if pocket else {}
    variants = tuple(
        Variant(name.replace("_", "-"), label_of(name), {"retrieve.retriever": name} | shared)
        for name in ("popularity", "item_knn", *learned)
    )
    about = "The whole catalogue: what a retriever proposes, reranked by the model."
    varied = "candidates"
    return Study("full-ranking", about, variants, kind="retrievers", varied=varied)


def plan_all(params: Mapping[str, Any]) -> list[Study]:
    """Return every study with its default options."""
    lengths = plan_summary_length(default_lengths(params))
    seeds = plan_seeds(look_up(params, "sft.seed"), 3)
    paper = [plan_table(), ABLATION, plan_block_size(), lengths, IMAGE_SUMMARY, LOSS, seeds]
    curve, catalogue = plan_learning_curve(params, BUDGETS), plan_full_ranking(params)
    return [*paper, COLD_ITEMS, plan_folds(params, 5), curve, catalogue]


def parse_values(text: str) -> Sequence[int]:
    """Read numbers such as ``50,100``, ascending.

    Raises:
        ParamsError: They are not whole numbers above 0.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        fix = "write them as 50,100,200"
        raise ParamsError(
            expected="whole numbers above 0, joined by commas",
            got=text,
            where="--values",
            fix=fix,
        )
    return sorted({int(part) for part in parts})


def default_lengths(params: Mapping[str, Any]) -> Sequence[int]:
    """Return the default lengths of a preference: the pocket model's texts are short."""
    return POCKET_LENGTHS if look_up(params, "preprocess.source") == "pocket" else REAL_LENGTHS


def check_study(study: Study, params: Mapping[str, Any]) -> None:
    """Refuse a study in which nothing would vary.

    Raises:
        ParamsError: ``params.yaml`` lacks a setting that the study changes, already has the
            settings of a variant, makes the varied setting idle, or has no model to compare.
    """
    for setting, scorer in _find_missing_models(study, params).items():
        fix = "set it: this study needs that model"
        raise ParamsError(
            expected=f"a model for {scorer}", got="null", where=f"{PARAMS}, {setting}", fix=fix
        )
    key, values = study.idle
    if key and look_up(params, key) in values:
        expected = f"settings under which the study {study.name} varies"
        got = f"{key}: {look_up(params, key)}"
        raise ParamsError(expected=expected, got=got, where=PARAMS, fix="set another value of it")
    for variant in study.variants:
        same = [key for key, value in variant.settings.items() if look_up(params, key) == value]
        compared = study.kind == "rows" and len(study.variants) > 1
        if compared and same and len(same) == len(variant.settings):
            got = f"the settings of '{variant.label}' already ({', '.join(same)})"
            fix = "restore the defaults, so that there is something to compare"
            raise ParamsError(
                expected=f"other settings for the study {study.name}",
                got=got,
                where=PARAMS,
                fix=fix,
            )


def _find_missing_models(study: Study, params: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of models that are null but needed, each with a scorer that needs it."""
    needed: dict[str, str] = {}
    for variant in study.variants:
        own = params.get("feature_baselines", {}).get("models", [])
        features = variant.settings.get("feature_baselines.models", own)
        for scorer in variant.shown():
            if scorer == MODEL:
                needed["recommender.model"] = scorer
            elif scorer in features:
                needed["encode_items.model"] = scorer
    return {
        setting: scorer
        for setting, scorer in needed.items()
        if params.get(setting.partition(".")[0], {}).get("model", "") is None
    }


def look_up(params: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key such as ``sft.seed``.

    Raises:
        ParamsError: There is none.
    """
    value: Any = params
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ParamsError(expected=f"a setting {key}", got="none", where=PARAMS, fix="add it")
        value = value[part]
    return value


def _sweep(
    name: str,
    about: str,
    varied: str,
    key: str,
    values: Sequence[int],
    idle: tuple[str, tuple[Any, ...]],
) -> Study:
    variants = tuple(Variant(str(value), str(value), {key: value}) for value in values)
    return Study(name, about, variants, kind="sweep", varied=varied, idle=idle)
