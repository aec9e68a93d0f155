"""SASRec: causal self-attention over the history (Kang and McAuley, ICDM 2018)."""

from typing import TYPE_CHECKING

from mllm_msr.baselines.discovery import Baseline, Inputs, Learner
from mllm_msr.baselines.settings import TransformerParams

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Training


def build(training: "Training", settings: TransformerParams, _: Inputs) -> Learner:
    """Build SASRec (:func:`build_transformer`)."""
    from mllm_msr.baselines.learning.cornac_models import SASRec, build_transformer

    return build_transformer(SASRec, training, settings)


BASELINE = Baseline(
    label="SASRec",
    stage="baselines",
    order=80,
    params=TransformerParams,
    build=build,
    grid=({"learning_rate": [0.001, 0.003]},),
)
