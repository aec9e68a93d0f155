"""Networks of GRU4Rec_F and SASRec_F: the next item from the features of the items before it.

An item's vector is the sum of its id's embedding and of its features, each projected to the same
width; any of these may be left out. A network reads the vectors of a history, and its last state
scores an item by its product with the item's vector.

- ``gru``: a GRU, as in GRU4Rec (Hidasi et al., ICLR 2016).
- ``attention``: causal self-attention with learned positions, as in SASRec (Kang and McAuley, ICDM
  2018).

Both learn each next known item by cross-entropy over all items with a known interaction, which
takes the place of the pairwise loss and of the one sampled negative of these papers. They are our
own networks, not the code of either.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from mllm_msr.baselines.discovery import Inputs
from mllm_msr.baselines.features import Vectors, read_columns, standardise
from mllm_msr.baselines.settings import SequentialParams
from mllm_msr.baselines.task import Candidates, Known, Task, Training, find_cold_items
from mllm_msr.core.arrays import Floats, Integers
from mllm_msr.core.devices import find_device_for_small_steps
from mllm_msr.core.errors import DataError, ModelError
from mllm_msr.ranking import auc, rank_targets

HEADS = 1  # of self-attention, as SASRec
QUESTIONS_PER_BATCH = 1024
CANDIDATES_AT_ONCE = 100_000  # whose vectors are in memory


def build_network(
    name: str, training: Training, settings: SequentialParams, inputs: Inputs
) -> "NetworkLearner":
    """Build the network of a baseline that reads features.

    Args:
        name: Of the baseline, for errors and the log.
        training: What to learn from.
        settings: Of the model and its training.
        inputs: Its table Features is read.

    Raises:
        DataError: Features are missing.
    """
    assert inputs.features, "the stage feature_baselines has it"
    features = read_columns(inputs.features, training.items, settings.features, name)
    return NetworkLearner(training, features, settings)


class NetworkLearner:
    """A network over features, which scores every item by a history."""

    def __init__(
        self, training: Training, features: Sequence[Vectors], settings: SequentialParams
    ) -> None:
        """Take what the network learns from; the labels of the selection choose the epoch.

        Args:
            training: What to learn from.
            features: Each of shape (items, its width), NaN in the rows of items without it; perhaps
                none, if items have ids.
            settings: Of the model and its training.
        """
        self.training, self.features, self.settings = training, features, settings
        self.model: NextItemModel

    def fit(self) -> None:
        """Train on what is known.

        Raises:
            DataError: There is nothing to train on, or nothing to choose the epoch by.
            ModelError: The training diverges.
        """
        windows = cut_windows(self.training.known, self.training.longest)
        valid = len(self.training.histories)
        if not windows or not valid:
            got = f"{len(windows):,} and {valid:,}"
            fix = "bring more users, or raise filter_sequences.valid_share"
            expected = "users with two known interactions, and questions of valid"
            raise DataError(expected=expected, got=got, where="filter_sequences", fix=fix)
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            self.model = self._make_model()
            _train(self.model, self.training, windows, self.settings)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return the network's weights; features are no part of them."""
        return {name: tensor.cpu().numpy() for name, tensor in self.model.state_dict().items()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Make the network and load its weights."""
        with torch.random.fork_rng():
            self.model = self._make_model()
        weights = {name: torch.from_numpy(array) for name, array in state.items()}
        self.model.load_state_dict(weights)

    def score_items(self, _: int | None, history: Integers) -> Floats:
        """Score all items by the end of a history, at most as long as the longest known one."""
        items = np.arange(len(self.training.items))
        every = Candidates(np.zeros_like(items), items, np.zeros(len(items), dtype=np.bool_))
        return score_questions(self.model, [history[-self.training.longest :]], every)

    def score_candidates(self, task: Task) -> Floats:
        """Score candidates by the histories of their questions."""
        return score_questions(self.model, task.questions.histories, task.candidates)

    def _make_model(self) -> "NextItemModel":
        """Make a model with random weights."""
        training = self.training
        model = NextItemModel(len(training.items), self.features, training.longest, self.settings)
        return model.to(find_device_for_small_steps())


class NextItemModel(nn.Module):
    """Vectors of items, and the network that reads a history of them."""

    def __init__(
        self, items: int, features: Sequence[Vectors], longest: int, settings: SequentialParams
    ) -> None:
        """Make a model with random weights.

        Args:
            items: How many items there are; histories are padded with this number.
            features: As of :class:`NetworkLearner`.
            longest: Items of the longest history.
            settings: Of the model.
        """
        super().__init__()
        self.items = items
        self.vectors = ItemVectors(items, features, settings)
        self.dropout = nn.Dropout(settings.dropout)
        self.network: nn.Module
        if settings.network == "gru":
            self.network = Recurrence(settings)
        else:
            self.network = Attention(longest, settings)

    def forward(self, histories: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Read histories; no state depends on what comes after it, padding included.

        Args:
            histories: Items, (histories, length), padded on the right.
            vectors: Of all items, (items, width), as :attr:`vectors` gives them.

        Returns:
            The state after each item, (histories, length, width).
        """
        padded = nn.functional.pad(vectors, (0, 0, 0, 1))
        states: torch.Tensor = self.network(self.dropout(padded[histories]))
        return states


class ItemVectors(nn.Module):
    """The sum of an id's embedding and of projected features."""

    def __init__(self, items: int, features: Sequence[Vectors], settings: SequentialParams) -> None:
        """Take the features, and make what is learned."""
        super().__init__()
        self.projections = nn.ModuleList(Projection(f, settings.width) for f in features)
        self.ids = _embedding(items, settings.width) if settings.ids else None

    def forward(self) -> torch.Tensor:
        """Return the vectors of all items, (items, width)."""
        parts = [projection() for projection in self.projections]
        return torch.stack([*parts, *([self.ids.weight] if self.ids else [])]).sum(dim=0)


class Projection(nn.Module):
    """One kind of features and the layer that projects them."""

    def __init__(self, feature: Vectors, width: int) -> None:
        """Take the feature; it is standardised here."""
        super().__init__()
        self.feature: torch.Tensor
        self.register_buffer("feature", torch.from_numpy(standardise(feature)), persistent=False)
        self.layer = nn.Linear(feature.shape[1], width)

    def forward(self) -> torch.Tensor:
        """Return the projection of all items, (items, width)."""
        projected: torch.Tensor = self.layer(self.feature)
        return projected


class Recurrence(nn.Module):
    """GRU4Rec's network."""

    def __init__(self, settings: SequentialParams) -> None:
        """Make the layers."""
        super().__init__()
        between = settings.dropout if settings.layers > 1 else 0.0
        self.gru = nn.GRU(
            settings.width, settings.width, settings.layers, batch_first=True, dropout=between
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the state after each input; (histories, length, width) -> the same shape."""
        states: torch.Tensor = self.gru(inputs)[0]
        return states


class Attention(nn.Module):
    """SASRec's network."""

    def __init__(self, longest: int, settings: SequentialParams) -> None:
        """Make the layers, and positions for histories of at most this length."""
        super().__init__()
        self.positions = _embedding(longest, settings.width)
        layer = nn.TransformerEncoderLayer(
            settings.width,
            HEADS,
            settings.width,
            settings.dropout,
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, settings.layers, nn.LayerNorm(settings.width), enable_nested_tensor=False
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the state after each input; (histories, length, width) -> the same shape."""
        length = inputs.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=inputs.device).triu(1)
        placed = inputs + self.positions.weight[:length]
        states: torch.Tensor = self.layers(placed, mask=later, is_causal=True)
        return states


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Make an embedding whose rows have about length 1; torch's own would drown the other parts."""
    embedding = nn.Embedding(rows, width)
    nn.init.normal_(embedding.weight, std=width**-0.5)
    return embedding


def cut_windows(known: Known, longest: int) -> list[Integers]:
    """Cut each user's known items into windows of at most ``longest + 1``.

    All of a window but its first item is to be predicted; windows share one item, so that each
    interaction but a user's first is predicted once.
    """
    by_user = np.split(known.items, np.flatnonzero(np.diff(known.users)) + 1)
    return [
        items[max(0, end - longest - 1) : end]
        for items in by_user
        for end in range(len(items), 1, -longest)
    ]


@torch.no_grad()
def score_questions(
    model: NextItemModel, histories: Sequence[Integers], asked: Candidates
) -> Floats:
    """Score candidates by the histories of their questions; a score per candidate."""
    model.eval()
    vectors, states = model.vectors(), []
    for start in range(0, len(histories), QUESTIONS_PER_BATCH):
        batch = histories[start : start + QUESTIONS_PER_BATCH]
        last = [len(history) - 1 for history in batch]
        states.append(model(_pad(model, batch), vectors)[range(len(batch)), last])
    state_of, vector_of = torch.cat(states).cpu().numpy(), vectors.cpu().numpy()
    scores = np.empty(len(asked.items))
    for start in range(0, len(scores), CANDIDATES_AT_ONCE):
        rows = slice(start, start + CANDIDATES_AT_ONCE)
        vector = vector_of[asked.items[rows]].astype(np.float64)
        scores[rows] = (state_of[asked.questions[rows]] * vector).sum(axis=1)
    return scores


def _train(
    model: NextItemModel,
    training: Training,
    windows: Sequence[Integers],
    settings: SequentialParams,
) -> None:
    """Train the model; its weights end as those of the epoch with the best validation AUC."""
    cold = torch.from_numpy(find_cold_items(training)).to(next(model.parameters()).device)
    optimiser = torch.optim.Adam(model.parameters(), settings.learning_rate)
    best, kept, waited = -1.0, model.state_dict(), 0
    with tqdm(range(settings.epochs), unit="epoch", desc=settings.network) as progress:
        for _ in progress:
            for batch in _shuffled(windows, settings.batch_size):
                optimiser.zero_grad()
                torch.autograd.backward(_loss(model, _pad(model, batch), cold))
                optimiser.step()
            found = _measure(model, training.histories, training.selection)
            progress.set_postfix(auc=f"{found:.4f}")
            waited = 0 if found > best else waited + 1
            if found > best:
                best, kept = found, copy.deepcopy(model.state_dict())
            if waited == settings.patience:
                break
    model.load_state_dict(kept)


def _loss(model: NextItemModel, windows: torch.Tensor, cold: torch.Tensor) -> torch.Tensor:
    """Average the cross-entropy of each next item among all that are not cold.

    Args:
        model: The model.
        windows: Items, (windows, length), padded on the right.
        cold: Items without a known interaction, (items,).
    """
    model.train()
    vectors, targets = model.vectors(), windows[:, 1:]
    states = model(windows[:, :-1], vectors)
    asked = targets != model.items
    logits = (states[asked] @ vectors.T).masked_fill(cold, -torch.inf)
    return nn.functional.cross_entropy(logits, targets[asked])


def _measure(model: NextItemModel, histories: Sequence[Integers], asked: Candidates) -> float:
    """Return the AUC, averaged over questions."""
    scores = score_questions(model, histories, asked)
    if not np.isfinite(scores).all():
        fix = "lower its learning rate"
        raise ModelError(
            expected="a training that converges",
            got="scores of inf or nan",
            where="validation",
            fix=fix,
        )
    return float(auc(rank_targets(asked.questions, scores, asked.labels)).mean())


def _shuffled(windows: Sequence[Integers], size: int) -> Iterator[list[Integers]]:
    """Cut windows into batches, in an order drawn anew."""
    order = torch.randperm(len(windows)).tolist()
    for start in range(0, len(order), size):
        yield [windows[index] for index in order[start : start + size]]


def _pad(model: NextItemModel, sequences: Sequence[Integers]) -> torch.Tensor:
    """Lay sequences of items out as rows, padded on the right; on the model's device."""
    rows = nn.utils.rnn.pad_sequence(
        [torch.from_numpy(items) for items in sequences], True, model.items
    )
    return rows.to(next(model.parameters()).device)
