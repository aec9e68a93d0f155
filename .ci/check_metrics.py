"""Check that the demo's metrics are where the pocket world must put them."""

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    """Check that the metrics of a demo run lie in the expected ranges."""
    metrics = json.loads(path.read_text())["uniform"]
    test, popularity, oracle = metrics["test"], metrics["popularity"], metrics["oracle"]
    targets = json.loads(path.read_text())["targets"]
    checks = {
        "AUC is .80 or more, or within .08 of the oracle": test["auc"] >= 0.80
        or test["auc"] >= oracle["auc"] - 0.08,
        "its interval is above popularity's": test["auc_low"] > popularity["auc_high"],
        "popularity is .6 to .8, as in catalogues with a long tail": 0.6 < popularity["auc"] < 0.8,
        "among other users' targets popularity is below .6": targets["popularity"]["auc"] < 0.6,
        "chance is .5": metrics["chance"]["auc"] == 0.5 == targets["chance"]["auc"],
        "nothing is above the oracle": test["auc"] <= oracle["auc_high"],
        "among other users' targets it is clear of popularity": targets["test"]["auc_low"]
        > max(targets[name]["auc_high"] for name in ("popularity", "target_popularity")),
        "among them it is above Item-kNN": targets["test"]["auc"] > targets["item_knn"]["auc"],
    }
    for claim, holds in checks.items():
        print(f"{'ok' if holds else 'FAILED'}: {claim}")
    print(f"test {test['auc']:.3f}, popularity {popularity['auc']:.3f}, oracle {oracle['auc']:.3f}")
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
