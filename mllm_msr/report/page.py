"""The report as one HTML file, put together from its sections."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mllm_msr.core.files import atomic_write
from mllm_msr.evaluation.calibration import scaling_of
from mllm_msr.evaluation.comparisons import LEVEL
from mllm_msr.evaluation.results import read_comparisons, read_metrics, samplings_of
from mllm_msr.evaluation.scorers import MODEL
from mllm_msr.evaluation.table import POCKET_NOTE
from mllm_msr.images.gallery import Gallery
from mllm_msr.report.calibration import describe_calibration
from mllm_msr.report.coverage import describe_coverage
from mllm_msr.report.dataset import describe_dataset
from mllm_msr.report.distributions import QUANTILES, describe_distributions
from mllm_msr.report.inputs import Inputs, open_tables
from mllm_msr.report.results import describe_results, describe_strata
from mllm_msr.report.settings import CANDIDATES, Settings, list_sections, state_protocol
from mllm_msr.report.stories import read_stories
from mllm_msr.report.studies import read_studies
from mllm_msr.report.training import describe_training
from mllm_msr.report.verdict import reach_verdict
from mllm_msr.report.whole_catalogue import describe_whole_catalogue

STYLE = "style.css"


def write_report(
    inputs: Inputs, settings: Settings, path: Path, warnings: Sequence[str] = ()
) -> int:
    """Write the report; return its size in bytes.

    Args:
        inputs: Outputs of the stages.
        settings: Of the run.
        path: The HTML file.
        warnings: Sentences above all figures.

    Raises:
        DataError: An input is missing or not what its stage writes, or the disk is full; nothing
            is written then.
    """
    content = render(gather(inputs, settings, warnings)).encode("utf-8")
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return len(content)


def gather(inputs: Inputs, settings: Settings, warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Return the variables of the template, by name.

    Stories, distributions and coverage are of the first sampling. Sections that need scores of a
    model are None in a run without a model, and that of the whole catalogue without a retriever.

    Args:
        inputs: Outputs of the stages.
        settings: Of the run.
        warnings: Sentences above all figures.

    Raises:
        DataError: An input is missing or not what its stage writes.
    """
    metrics = read_metrics(inputs.evaluated / "metrics.json")
    comparisons = read_comparisons(inputs.evaluated / "comparisons.parquet")
    sampling = samplings_of(metrics)[0]
    results = describe_results(inputs, metrics, comparisons)
    scored = results.scored
    scaling = scaling_of(metrics[sampling].get("calibration"))
    with open_tables(inputs, sampling) as connection, Gallery(inputs.images) as gallery:
        return {
            "settings": settings,
            "model": MODEL,
            "warnings": warnings,
            "pocket_note": POCKET_NOTE if settings.pocket else "",
            "level": LEVEL,
            "verdict": reach_verdict(connection, metrics, comparisons, settings.dataset),
            "protocol": state_protocol(settings, scored),
            "sections": list(list_sections(settings)),
            "dataset": describe_dataset(inputs, settings),
            "results": results,
            "strata": describe_strata(metrics),
            "whole_catalogue": describe_whole_catalogue(metrics),
            "shown_sampling": CANDIDATES[sampling],
            "training": describe_training(inputs) if scored else None,
            "distributions": describe_distributions(connection, settings) if scored else None,
            "quantiles": QUANTILES,
            "calibration": describe_calibration(inputs, metrics, settings),
            "coverage": describe_coverage(connection, settings, scored),
            "stories": read_stories(connection, gallery, settings, scaling) if scored else None,
            "studies": read_studies(inputs.studies),
        }


def render(content: dict[str, Any]) -> str:
    """Fill the template; all text is escaped, and the policy allows only our own style."""
    environment = Environment(
        loader=PackageLoader("mllm_msr.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = environment.get_template(STYLE).render()
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    page = environment.get_template("report.html")
    return page.render(style=Markup(style), style_digest=digest, **content)  # noqa: S704 - ours
