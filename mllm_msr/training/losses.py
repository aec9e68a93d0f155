"""What fine-tuning minimises: the right answer pair by pair, or the target among its sequence's.

Both look at the token where the answer begins and at nothing else.
"""

import torch
from torch import nn


def yes_no_loss(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Give the cross-entropy of each pair's right answer over the whole vocabulary (the paper's).

    Args:
        logits: After each prompt, (pairs, vocabulary), float32.
        answers: The right answer's token of each pair, (pairs,).
    """
    return nn.functional.cross_entropy(logits, answers)


def listwise_loss(
    log_odds: torch.Tensor, positive: torch.Tensor, sequences: torch.Tensor
) -> torch.Tensor:
    """Give the cross-entropy of each sequence's target among its candidates, by their log-odds.

    It asks for what a ranking needs, that the target is above its negatives, and for no level of
    p(yes). (ListNet's top-one probability: Cao et al., ICML 2007.)

    Args:
        log_odds: Of yes against no, (pairs,), float32.
        positive: Whether a pair is its sequence's target, (pairs,).
        sequences: The sequence of each pair, (pairs,); all of its candidates are there.
    """
    _, number = torch.unique(sequences, return_inverse=True)
    own = number[None] == torch.arange(int(number.max()) + 1, device=number.device)[:, None]
    listed = torch.where(own, log_odds, -torch.inf)  # (sequences, pairs)
    of_target = torch.where(own & positive, log_odds, 0.0).sum(dim=1)
    return (listed.logsumexp(dim=1) - of_target).mean()
