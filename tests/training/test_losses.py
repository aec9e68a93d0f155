"""The losses, against numbers worked out by hand and against each other."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_msr.training.losses import listwise_loss, yes_no_loss


def test_the_yes_no_loss_is_the_mean_cross_entropy_of_the_right_answers() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    found = yes_no_loss(logits, torch.tensor([1, 2]))
    assert math.isclose(float(found), -(math.log(0.25) + math.log(0.8)) / 2, rel_tol=1e-6)


def test_the_listwise_loss_is_the_mean_cross_entropy_of_the_targets() -> None:
    log_odds = torch.log(torch.tensor([3.0, 5.0, 1.0, 5.0]))
    positive = torch.tensor([True, False, False, True])
    found = listwise_loss(log_odds, positive, torch.tensor([7, 2, 7, 2]))
    assert math.isclose(float(found), -(math.log(3 / 4) + math.log(5 / 10)) / 2, rel_tol=1e-6)


@given(st.lists(st.floats(-9, 9), min_size=4, max_size=4), st.floats(-5, 5))
def test_the_listwise_loss_does_not_depend_on_the_level(
    log_odds: list[float], level: float
) -> None:
    scores = torch.tensor(log_odds)
    positive, sequences = torch.tensor([True, False, True, False]), torch.tensor([1, 1, 2, 2])
    first = listwise_loss(scores, positive, sequences)
    torch.testing.assert_close(
        listwise_loss(scores + level, positive, sequences), first, atol=1e-4, rtol=1e-4
    )


def test_with_one_negative_it_is_the_logistic_loss_of_the_difference() -> None:
    scores = torch.tensor([1.5, -0.5])
    found = listwise_loss(scores, torch.tensor([True, False]), torch.tensor([0, 0]))
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(torch.tensor(2.0)))
