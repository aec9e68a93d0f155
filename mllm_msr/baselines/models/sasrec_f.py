"""SASRec_F: self-attention over the features of the history's items."""

from mllm_msr.baselines.registry import Baseline, Inputs
from mllm_msr.baselines.settings import SequentialParams
from mllm_msr.baselines.task import Floats, Task


def score(task: Task, settings: SequentialParams, inputs: Inputs) -> Floats:
    """Train the network on features and score every candidate by the history of its question.

    Raises:
        DataError: Features are missing, or there is nothing to train on.
        ModelError: The training diverges.
    """
    from mllm_msr.baselines.features import read_columns
    from mllm_msr.baselines.sequential import score_histories

    assert inputs.features, "the stage feature_baselines has it"
    features = read_columns(inputs.features, task.items, settings.features, "sasrec_f")
    return score_histories(task, features, settings)


BASELINE = Baseline(
    label="SASRec_F",
    stage="feature_baselines",
    order=10,
    params=SequentialParams,
    score=score,
    grid=({"learning_rate": [0.001, 0.003, 0.01], "dropout": [0.1, 0.3]},),
)
