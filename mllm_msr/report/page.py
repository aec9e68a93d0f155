"""Puts the sections of the report together into one file of HTML."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mllm_msr.evaluation import MODEL, POCKET_NOTE
from mllm_msr.files import written_whole
from mllm_msr.gallery import Gallery
from mllm_msr.report.coverage import describe_coverage
from mllm_msr.report.dataset import describe_dataset
from mllm_msr.report.inputs import Inputs, open_tables
from mllm_msr.report.results import describe_results
from mllm_msr.report.settings import Settings, list_sections, state_protocol
from mllm_msr.report.spread import QUANTILES, describe_spread
from mllm_msr.report.stories import tell_stories
from mllm_msr.report.studies import read_studies
from mllm_msr.report.training import describe_training

STYLE = "style.css"


def write_report(inputs: Inputs, settings: Settings, path: Path) -> int:
    """Write the report; returns its size in bytes.

    Raises:
        DataError: An input is missing or not what its stage writes, or the disk is full; nothing
            is written then.
    """
    content = render(gather(inputs, settings)).encode("utf-8")
    with written_whole(path) as temporary:
        temporary.write_bytes(content)
    return len(content)


def gather(inputs: Inputs, settings: Settings) -> dict[str, Any]:
    """Read everything that the page shows, by the names that the template has for it."""
    with open_tables(inputs) as connection, Gallery(inputs.images) as gallery:
        results = describe_results(inputs, settings)
        return {
            "settings": settings,
            "model": MODEL,
            "pocket_note": POCKET_NOTE if settings.pocket else "",
            "protocol": state_protocol(settings),
            "sections": list(list_sections(settings)),
            "dataset": describe_dataset(inputs, settings),
            "results": results,
            "training": describe_training(inputs),
            "spread": describe_spread(connection, settings) if results.model else None,
            "quantiles": QUANTILES,
            "coverage": describe_coverage(connection, settings),
            "stories": tell_stories(connection, gallery, settings) if results.model else None,
            "studies": read_studies(inputs.studies),
        }


def render(content: dict[str, Any]) -> str:
    """Fill the template; every text is escaped, and the policy admits no style but ours."""
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
