"""The list of scorers."""

from mllm_msr.core.params import BaselinesParams, FeatureBaselinesParams, TextBaselinesParams
from mllm_msr.evaluation import scorers


def test_every_baseline_of_the_settings_has_a_label():
    sections = (BaselinesParams, FeatureBaselinesParams, TextBaselinesParams)
    named = {name for section in sections for name in section.model_fields}
    assert set(scorers.BASELINES) == named - {"models"}
