"""The Markdown table of an evaluation."""

from three_items import evaluate_world

from mllm_msr.evaluation.scorers import MODEL
from mllm_msr.evaluation.table import format_table


def test_the_table_has_a_row_per_scorer_in_markdown(world):
    result = evaluate_world(world)
    lines = format_table(result.metrics, result.comparisons).splitlines()
    assert " ".join(lines[0].split()) == "| test | AUC, uniform | HR@1 | NDCG@1 | MRR@1 |"
    scorers = [MODEL, "oracle", "target popularity", "popularity", "chance"]
    assert [line.split("|")[1].strip() for line in lines[2:7]] == scorers
    assert "0.875 [0.750, 1.000]" in lines[2]
    assert lines[8:] == [
        "negatives: uniform; test sequences: uniform: 2",
        "in brackets: 90% bootstrap intervals over sequences; those of the other figures are in"
        " metrics.json",
        "not significantly above the non-personalised baselines (difference in AUC, paired"
        " randomisation tests, Holm-corrected, p < 0.05):",
        "  uniform: MLLM-MSR (target popularity, popularity)",
        "pocket world: an embedded toy, no claim about real data",
    ]
    assert len({len(line) for line in lines[:7]}) == 1


def test_the_table_shows_the_papers_cutoff_if_measured(world):
    result = evaluate_world(world, ks=[3, 5, 10])
    table = format_table(result.metrics, result.comparisons)
    assert "HR@5" in table
    assert "HR@3" not in table
