"""GRU4Rec: a recurrent network of one layer (Hidasi et al., ICLR 2016)."""

from typing import TYPE_CHECKING

import numpy as np

from mllm_msr.baselines.discovery import Baseline, Inputs, Learner
from mllm_msr.baselines.settings import LearnedParams
from mllm_msr.core.errors import DataError
from mllm_msr.core.params import Dropout

if TYPE_CHECKING:
    from mllm_msr.baselines.task import Training


class Gru4RecParams(LearnedParams):
    """A recurrent network of one layer."""

    dropout: Dropout  # of the items' vectors


def build(training: "Training", settings: Gru4RecParams, _: Inputs) -> Learner:
    """Build GRU4Rec, whose items are embedded alike on both sides.

    Raises:
        DataError: There is nothing to train on.
        ModelError: Cornac is not installed.
    """
    from mllm_msr.baselines.learning.cornac_models import GRU4Rec, NextItemLearner, translate

    sessions = np.count_nonzero(np.bincount(training.known.users) > 1)
    if not sessions:
        raise DataError(
            expected="users with two known interactions",
            got="none",
            where="filter_sequences",
            fix="bring more users, or leave gru4rec out of baselines.models",
        )
    model = GRU4Rec(
        layers=[settings.width],
        dropout_p_embed=settings.dropout,
        # Cornac fails on a batch that it cannot fill.
        batch_size=min(settings.batch_size, sessions),
        **translate(settings, "width", "dropout", "batch_size"),
    )
    return NextItemLearner(model, training)


BASELINE = Baseline(
    label="GRU4Rec",
    stage="baselines",
    order=100,
    params=Gru4RecParams,
    build=build,
    grid=({"dropout": [0.0, 0.3], "popularity_exponent": [0.0, 0.5], "epochs": [5, 10]},),
)
