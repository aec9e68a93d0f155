"""The losses of fine-tuning: pairwise cross-entropy of the answer, or listwise over candidates.

Both are computed on the answer token alone.
"""

import torch
from torch import nn


def yes_no_loss(logits: torch.Tensor, answer_token_ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the right answers over the vocabulary (the paper's loss).

    Args:
        logits: After each prompt, (pairs, vocabulary), float32.
        answer_token_ids: The token id of each pair's right answer, (pairs,).
    """
    return nn.functional.cross_entropy(logits, answer_token_ids)


def listwise_loss(
    log_odds: torch.Tensor, positive: torch.Tensor, sequences: torch.Tensor
) -> torch.Tensor:
    """Return the mean cross-entropy of each sequence's target among its candidates' log-odds.

    It rewards ranking the target above its negatives, and does not depend on the level of p(yes)
    (ListNet's top-one probability: Cao et al., ICML 2007).

    Args:
        log_odds: Of yes against no, (pairs,), float32.
        positive: Whether a pair is its sequence's target, (pairs,).
        sequences: The sequence of each pair, (pairs,), with all candidates of each sequence.
    """
    _, number = torch.unique(sequences, return_inverse=True)
    member = number[None] == torch.arange(int(number.max()) + 1, device=number.device)[:, None]
    candidates = torch.where(member, log_odds, -torch.inf)  # (sequences, pairs)
    target = torch.where(member & positive, log_odds, 0.0).sum(dim=1)
    return (candidates.logsumexp(dim=1) - target).mean()
