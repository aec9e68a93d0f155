"""BERT4Rec: self-attention in both directions (Sun et al., CIKM 2019).

Cornac trains it to predict the last item from those before it, instead of masked items.
"""

from mllm_msr.baselines.registry import Baseline, Inputs
from mllm_msr.baselines.settings import TransformerParams
from mllm_msr.baselines.task import Floats, Task


def score(task: Task, settings: TransformerParams, _: Inputs) -> Floats:
    """Train BERT4Rec on stretches as long as the longest history, and score.

    Raises:
        ModelError: Cornac is not installed.
    """
    from mllm_msr.baselines.cornac_models import BERT4Rec, find_longest, score_next_items, translate

    model = BERT4Rec(max_len=find_longest(task), **translate(settings))
    return score_next_items(model, task, task.questions.users)


BASELINE = Baseline(
    label="BERT4Rec",
    stage="baselines",
    order=90,
    params=TransformerParams,
    score=score,
    grid=({"learning_rate": [0.001, 0.003]},),
)
