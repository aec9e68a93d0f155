"""Detection of the pocket model, to refuse it on other data than the pocket world.

It was trained on generated toys only. On other data its texts are fluent and wrong: "Toy Story"
becomes a crescent on a beach.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

from mllm_msr.core.errors import ParamsError
from mllm_msr.core.files import file_digest
from mllm_msr.core.params import PreprocessParams

SHIPPED = Path(__file__).parent / "model"
# Either file identifies it: other weights with this tokenizer still know only its words.
IDENTIFYING_FILES = ("model.safetensors", "tokenizer.json")


def is_pocket_model(name: str) -> bool:
    """Return whether a model is the shipped pocket model or a copy of it.

    Args:
        name: A folder or a hub model. A hub model is never the pocket model.
    """
    folder = Path(name)
    if not folder.is_dir():
        return False
    if folder.resolve() == SHIPPED:
        return True
    files = [(folder / file, SHIPPED / file) for file in IDENTIFYING_FILES]
    return any(_are_equal(*pair) for pair in files if all(file.is_file() for file in pair))


def find_misused_pocket_models(source: str, models: Mapping[str, str | None]) -> list[str]:
    """Return the settings that use the pocket model on other data than the pocket world.

    Args:
        source: The setting ``preprocess.source``.
        models: Models by setting, such as ``recommender.model``; None: no model.
    """
    if source == "pocket":
        return []
    return [setting for setting, model in models.items() if model and is_pocket_model(model)]


def warn_of_pocket_model(source: str, models: Mapping[str, str | None]) -> list[str]:
    """Return the warnings for results of the pocket model on other data, if any.

    Arguments are those of :func:`find_misused_pocket_models`.
    """
    misused = find_misused_pocket_models(source, models)
    if not misused:
        return []
    return [
        f"not a result: the pocket model, a toy that knows only the pocket world, read this data"
        f" ({', '.join(misused)})"
    ]


def refuse_pocket_model(setting: str, model: str, preprocess: PreprocessParams) -> None:
    """Refuse the pocket model on other data than the pocket world.

    Args:
        setting: The setting of the model, such as ``recommender.model``.
        model: Its value.
        preprocess: The settings ``source`` and ``allow_pocket_model``.

    Raises:
        ParamsError: It is the pocket model, the source is not ``pocket``, and
            ``allow_pocket_model`` is false.
    """
    if preprocess.allow_pocket_model:
        return
    if find_misused_pocket_models(preprocess.source, {setting: model}):
        raise ParamsError(
            expected=f"a model for preprocess.source: {preprocess.source}",
            got=f"the pocket model ({model}), which knows only the toys of the pocket world",
            where=setting,
            fix="run python -m mllm_msr.presets apply ids_only to go without a model, or set the"
            " models of summarize_items, encode_items, infer_preferences and recommender to real"
            " ones (README, A real model), or set preprocess.allow_pocket_model to true",
        )


@functools.cache
def _are_equal(file: Path, shipped: Path) -> bool:
    same_size = file.stat().st_size == shipped.stat().st_size
    return same_size and file_digest(file) == file_digest(shipped)
