"""GRU4Rec on summaries: features of summaries alone, as in the paper's preliminary study.

With ``gru4rec_image`` it answers whether a summary is as good as the image.
"""

from typing import TYPE_CHECKING

from mllm_msr.baselines.discovery import Baseline, Inputs, Learner
from mllm_msr.baselines.settings import SequentialParams

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Training


def build(training: "Training", settings: SequentialParams, inputs: Inputs) -> Learner:
    """Build the network on features (:func:`build_network`)."""
    from mllm_msr.baselines.learning.sequential import build_network

    return build_network("gru4rec_summary", training, settings, inputs)


BASELINE = Baseline(
    label="GRU4Rec on summaries",
    stage="feature_baselines",
    order=30,
    params=SequentialParams,
    build=build,
)
