"""SASRec_F: self-attention over the features of the history's items."""

from typing import TYPE_CHECKING

from mllm_msr.baselines.discovery import Baseline, Inputs, Learner
from mllm_msr.baselines.settings import SequentialParams

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Training


def build(training: "Training", settings: SequentialParams, inputs: Inputs) -> Learner:
    """Build the network on features (:func:`build_network`)."""
    from mllm_msr.baselines.learning.sequential import build_network

    return build_network("sasrec_f", training, settings, inputs)


BASELINE = Baseline(
    label="SASRec_F",
    stage="feature_baselines",
    order=10,
    params=SequentialParams,
    build=build,
    grid=({"learning_rate": [0.001, 0.003, 0.01], "dropout": [0.1, 0.3]},),
)
