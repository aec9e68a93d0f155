"""BERT4Rec: self-attention in both directions (Sun et al., CIKM 2019).

Cornac trains it to predict the last item from those before it, instead of masked items.
"""

from typing import TYPE_CHECKING

from mllm_msr.baselines.discovery import Baseline, Inputs, Learner
from mllm_msr.baselines.settings import TransformerParams

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Training


def build(training: "Training", settings: TransformerParams, _: Inputs) -> Learner:
    """Build BERT4Rec (:func:`build_transformer`)."""
    from mllm_msr.baselines.learning.cornac_models import BERT4Rec, build_transformer

    return build_transformer(BERT4Rec, training, settings)


BASELINE = Baseline(
    label="BERT4Rec",
    stage="baselines",
    order=90,
    params=TransformerParams,
    build=build,
    grid=({"learning_rate": [0.001, 0.003]},),
)
