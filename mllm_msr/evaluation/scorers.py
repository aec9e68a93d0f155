"""The scorers: their names, labels and order, and which of them know the user.

Every scorer ranks the same candidates, once for each sampling of their negatives, which is an
evaluation protocol (:mod:`mllm_msr.data.candidates`):

- ``MLLM-MSR``, the model under evaluation, if it was run;
- ``oracle``, in the pocket world only: the log weights by which its users choose, so the best that
  any scorer can reach there;
- the baselines, each with a table of scores (:mod:`mllm_msr.baselines`);
- ``target_popularity``, how often an item is the target of a training sequence, ties broken by
  popularity: what the recommender's training labels say of an item without knowing the user. Where
  targets are late interactions and negatives any, it is far above ``popularity``;
- ``popularity``, the number of an item's interactions that are known when a model is trained
  (:mod:`mllm_msr.data.sequences`): of users with a valid or test target only the interactions
  before it, of other users all; under the split by time only those before the first valid target;
- ``chance``, the same score for all candidates. Metrics are expectations over the orders of ties,
  so its figures are exact, and its intervals have no width where all sequences have the same number
  of candidates.
"""

from mllm_msr.baselines.discovery import all_baselines

MODEL = "MLLM-MSR"
# Labels of the baselines, in the order of rows.
BASELINES = {baseline.name: baseline.label for baseline in all_baselines()}
LABELS = BASELINES | {"target_popularity": "target popularity"}
# Non-personalised baselines: they do not know the user. All other scorers are tested against them.
NON_PERSONAL = (
    "target_popularity",
    *(baseline.name for baseline in all_baselines() if not baseline.personal),
    "popularity",
)
UNTESTED = ("oracle", "chance", *NON_PERSONAL)
SCORERS = (  # in the order of rows
    MODEL,
    "oracle",
    *BASELINES,
    "target_popularity",
    "popularity",
    "chance",
)
# Of the model in metrics.json; the others are named by scorers.
OWN_SECTIONS = ("valid", "test", "calibration")


def label_of(scorer: str) -> str:
    """Return what tables and figures call a scorer."""
    return LABELS.get(scorer, scorer)


def section_of(scorer: str) -> str:
    """Return the section of ``metrics.json`` with a scorer's figures of the test sequences."""
    return "test" if scorer == MODEL else scorer
