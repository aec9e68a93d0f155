"""VBPR: factors of users and items, those of items also from images (He and McAuley, AAAI 2016).

It ignores the order of interactions: a score depends on user and candidate alone.
"""

from typing import Annotated

from pydantic import Field

from mllm_msr.baselines.registry import Baseline, Inputs
from mllm_msr.baselines.task import Floats, Task, find_cold_users
from mllm_msr.core.params import BatchSize, Epochs, LearningRate, Section, Seed, Width


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


def score(task: Task, settings: VbprParams, inputs: Inputs) -> Floats:
    """Train VBPR and score the candidates by user; of a cold-start user, by the items alone.

    Raises:
        DataError: No item has an image's vector.
        ModelError: Cornac is not installed.
    """
    from mllm_msr.baselines.features import read_columns, standardise

    assert inputs.features, "the stage feature_baselines has it"
    (images,) = read_columns(inputs.features, task.items, ["image"], "vbpr")
    # After the features: what an error says first does not depend on what is installed.
    from mllm_msr.baselines.cornac_models import (
        VBPR,
        Dataset,
        ImageModality,
        name_device,
        number,
        pick_candidates,
    )

    data = Dataset(**number(task), seed=settings.seed)
    data.add_modalities(item_image=ImageModality(features=standardise(images)))
    model = VBPR(
        k=settings.width,
        k2=settings.image_width,
        n_epochs=settings.epochs,
        use_gpu=name_device() == "cuda",
        verbose=True,  # a progress bar
        **settings.model_dump(exclude={"width", "image_width", "epochs"}),
    ).fit(data)
    cold = find_cold_users(task, least=1)  # whose vectors are still those of chance
    model.gamma_user[cold] = 0
    model.theta_user[cold] = 0
    return pick_candidates(task, map(model.score, task.questions.users.tolist()))


BASELINE = Baseline(
    label="VBPR",
    stage="feature_baselines",
    order=50,
    params=VbprParams,
    score=score,
    grid=({"epochs": [20, 50], "learning_rate": [0.002, 0.005, 0.02]},),
)
