"""SASRec: causal self-attention over the history (Kang and McAuley, ICDM 2018)."""

from mllm_msr.baselines.registry import Baseline, Inputs
from mllm_msr.baselines.settings import TransformerParams
from mllm_msr.baselines.task import Floats, Task


def score(task: Task, settings: TransformerParams, _: Inputs) -> Floats:
    """Train SASRec on stretches as long as the longest history, and score.

    Raises:
        ModelError: Cornac is not installed.
    """
    from mllm_msr.baselines.cornac_models import SASRec, find_longest, score_next_items, translate

    model = SASRec(max_len=find_longest(task), **translate(settings))
    return score_next_items(model, task, task.questions.users)


BASELINE = Baseline(
    label="SASRec",
    stage="baselines",
    order=80,
    params=TransformerParams,
    score=score,
    grid=({"learning_rate": [0.001, 0.003]},),
)
