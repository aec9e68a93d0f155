"""VBPR: factors of users and items, those of items also from images (He and McAuley, AAAI 2016).

It ignores the order of interactions: a score depends on user and candidate alone.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mllm_msr.baselines.discovery import Baseline, Inputs, Learner
from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.core.params import BatchSize, Epochs, LearningRate, Section, Seed, Width

if TYPE_CHECKING:
    from mllm_msr.baselines.features import Vectors
    from mllm_msr.baselines.learning.cornac_models import VBPR
    from mllm_msr.baselines.task import Task, Training

LEAST = 1  # known interactions from which on a user's vectors are not those of chance
# Attributes of Cornac's model that scoring reads.
STATE = ("beta_item", "gamma_user", "gamma_item", "theta_user", "theta_item", "visual_bias")


class VbprParams(Section):
    """Widths and training."""

    width: Width  # of the factors of users and items
    image_width: Width  # of the users' factors for images, and of the images' projection
    epochs: Epochs
    batch_size: BatchSize  # interactions
    learning_rate: LearningRate
    lambda_w: Annotated[float, Field(ge=0)]  # Cornac's names of the regularisation: of factors,
    lambda_b: Annotated[float, Field(ge=0)]  # of biases,
    lambda_e: Annotated[float, Field(ge=0)]  # and of the projection
    seed: Seed


class VbprLearner:
    """Cornac's VBPR on the known interactions and the items' images."""

    def __init__(self, model: "VBPR", training: "Training", images: "Vectors") -> None:
        """Take an untrained model, and what it learns from.

        Args:
            model: Untrained.
            training: What is known.
            images: Standardised, [items, width].
        """
        self.model, self.training, self.images = model, training, images

    def fit(self) -> None:
        """Train the model; the vectors of cold-start users become zeros."""
        from mllm_msr.baselines.learning.cornac_models import ImageModality, PairDataset, number
        from mllm_msr.baselines.task import find_cold_users

        data = PairDataset(**number(self.training), seed=self.model.seed)
        data.add_modalities(item_image=ImageModality(features=self.images))
        self.model.fit(data)
        cold = find_cold_users(self.training, LEAST)
        self.model.gamma_user[cold] = 0
        self.model.theta_user[cold] = 0

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return the factors of users and items."""
        return {name: getattr(self.model, name) for name in STATE}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Load the factors of users and items."""
        for name in STATE:
            setattr(self.model, name, state[name])

    def score_items(self, user: int | None, _: Integers) -> Floats:
        """Score all items for a user; without one, by the items alone."""
        if user is None:
            scores = np.add(self.model.beta_item, self.model.visual_bias)
        else:
            scores = self.model.score(user)
        return np.asarray(scores, dtype=np.float64)

    def score_candidates(self, task: "Task") -> Floats:
        """Score candidates by user; of a cold-start user, by the items alone."""
        from mllm_msr.baselines.learning.cornac_models import pick_candidates
        from mllm_msr.baselines.task import log_cold_users

        log_cold_users(task, LEAST)
        return pick_candidates(task, self.score_items)


def build(training: "Training", settings: VbprParams, inputs: Inputs) -> Learner:
    """Build VBPR, which scores by user; of a cold-start user, by the items alone.

    Raises:
        DataError: No item has an image's vector.
        ModelError: Cornac is not installed.
    """
    from mllm_msr.baselines.features import read_columns, standardise

    assert inputs.features, "the stage feature_baselines has it"
    (images,) = read_columns(inputs.features, training.items, ["image"], "vbpr")
    # After the features: what an error says first does not depend on what is installed.
    from mllm_msr.baselines.learning.cornac_models import VBPR, name_device

    model = VBPR(
        k=settings.width,
        k2=settings.image_width,
        n_epochs=settings.epochs,
        use_gpu=name_device() == "cuda",
        verbose=True,  # a progress bar
        **settings.model_dump(exclude={"width", "image_width", "epochs"}),
    )
    return VbprLearner(model, training, standardise(images))


BASELINE = Baseline(
    label="VBPR",
    stage="feature_baselines",
    order=50,
    params=VbprParams,
    build=build,
    grid=({"epochs": [20, 50], "learning_rate": [0.002, 0.005, 0.02]},),
)
