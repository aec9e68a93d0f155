"""Metrics computed by ranx, as a reference."""

import numpy as np

KS = (3, 5, 10)


def ranx_figures(questions: list[list[float]]) -> dict[str, np.ndarray]:
    """Return ranx's metrics of the same questions, per sequence."""
    import numba

    numba.config.DISABLE_JIT = True  # compiling takes longer than these few questions
    from ranx import Qrels, Run, evaluate

    qrels = Qrels({f"{i:06}": {"0": 1} for i in range(len(questions))})
    run = {f"{i:06}": {str(j): s for j, s in enumerate(q)} for i, q in enumerate(questions)}
    names = {"hr": "hit_rate", "ndcg": "ndcg", "mrr": "mrr"}
    asked = {f"{ours}@{k}": f"{theirs}@{k}" for ours, theirs in names.items() for k in KS}
    figures = evaluate(qrels, Run(run), list(asked.values()), return_mean=False)
    return {ours: figures[theirs] for ours, theirs in asked.items()}
