"""The order of the stages in ``dvc.yaml``, for a stage's progress line."""

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from mllm_msr.core.params import read_yaml


def describe_stage() -> str:
    """Return a line such as "stage 9 of 24: score"; empty if DVC did not start this process.

    The numbers follow the order in ``dvc.yaml``: DVC runs the stages in that order, because no
    stage reads what a later one writes.
    """
    stage = os.environ.get("DVC_STAGE")
    if not stage or not Path("dvc.yaml").is_file():
        return ""
    stages = list(name_stages(Path("dvc.yaml"), Path("params.yaml")))
    return f"stage {stages.index(stage) + 1} of {len(stages)}: {stage}" if stage in stages else ""


def name_stages(pipeline: Path, params: Path) -> Iterator[str]:
    """Yield the names of a pipeline's stages in file order, with DVC's names for matrix items.

    Args:
        pipeline: The ``dvc.yaml``; a stage with a matrix yields one name per item.
        params: The ``params.yaml`` in which values such as ``${baselines.models}`` are looked up.
    """
    settings = read_yaml(params)
    for name, stage in read_yaml(pipeline)["stages"].items():
        items = []
        for values in stage.get("matrix", {}).values():
            section, _, key = values.removeprefix("${").removesuffix("}").partition(".")
            items.append(map(str, settings[section][key]))
        if items:
            yield from (f"{name}@{'-'.join(item)}" for item in product(*items))
        else:
            yield name
