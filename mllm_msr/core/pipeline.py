"""Which stage of how many runs now: the pipeline as dvc.yaml has it."""

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from mllm_msr.core.params import read_yaml


def describe_stage() -> str:
    """Return a line such as "stage 9 of 21: score"; empty where DVC does not run this process.

    DVC goes through ``dvc.yaml`` from top to bottom, since no stage there reads what a later one
    writes.
    """
    stage = os.environ.get("DVC_STAGE")
    if not stage or not Path("dvc.yaml").is_file():
        return ""
    stages = list(name_stages(Path("dvc.yaml"), Path("params.yaml")))
    return f"stage {stages.index(stage) + 1} of {len(stages)}: {stage}" if stage in stages else ""


def name_stages(pipeline: Path, params: Path) -> Iterator[str]:
    """Yield the names of a pipeline's stages in its order, as DVC has them.

    Args:
        pipeline: The file ``dvc.yaml``; a stage with a matrix counts once for each of its items.
        params: The file that values such as ``${baselines.models}`` are looked up in.
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
