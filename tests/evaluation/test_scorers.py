"""The list of scorers."""

from mllm_msr.core.params import load_all_params
from mllm_msr.evaluation import scorers


def test_every_baseline_of_the_settings_has_a_label():
    settings = load_all_params()
    sections = (settings.baselines, settings.feature_baselines, settings.text_baselines)
    named = {name for section in sections for name in section.model_dump()}
    assert set(scorers.BASELINES) == named - {"models"}
