"""The report: its sections, its warnings and its Content-Security-Policy."""

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from report_world import HOSTILE, make_settings, write_report_world
from small_world import image_row

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Images, PerSequence, Sequences
from mllm_msr.core.tables import read_rows, write_rows
from mllm_msr.evaluation.results import read_metrics
from mllm_msr.images.gallery import Gallery
from mllm_msr.report.dataset import describe_dataset
from mllm_msr.report.page import gather, render, write_report
from mllm_msr.report.settings import list_sections, state_protocol
from mllm_msr.report.studies import read_studies
from mllm_msr.report.thumbnails import make_thumbnail

STYLE = Path("mllm_msr/report/templates/style.css")


def page(inputs, **changes) -> str:
    return render(gather(inputs, make_settings(**changes)))


def text(html: str) -> str:
    body = html.partition("<body>")[2]
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_equal_inputs_give_equal_bytes(finished, tmp_path):
    sizes = [write_report(finished, make_settings(), tmp_path / name) for name in ("a", "b")]
    one, other = ((tmp_path / name).read_bytes() for name in ("a", "b"))
    assert one == other
    assert sizes == [len(one)] * 2


def test_every_address_is_inside_the_page(finished):
    html = page(finished)
    addresses = re.findall(r'\b(?:src|href)="([^"]*)"', html)
    assert len(addresses) > 20
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "url(" not in html
    assert "@import" not in html


def test_the_policy_admits_images_inside_and_this_very_style_only(finished):
    html = page(finished)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert " style=" not in html  # which the policy would not apply


def test_a_hostile_title_is_text(tmp_path):
    inputs = write_report_world(tmp_path, {"f": HOSTILE, "a": '"><img src=x onerror=alert(1)>'})
    html = page(inputs)
    assert "<script" not in html
    assert "onerror=alert(1)&gt;" in html
    assert "&lt;script&gt;" in html


def test_the_table_has_a_row_for_every_section_with_an_auc(copy):
    path = copy.evaluated / "metrics.json"
    metrics = json.loads(path.read_text())
    added = {"auc": 0.7, "auc_low": 0.6, "auc_high": 0.8, "sequences": 3}
    metrics["uniform"] |= {"New": added, "notes": {"seconds": 3}}
    path.write_text(json.dumps(metrics))
    first, second = gather(copy, make_settings())["results"].protocols
    names = ["New", "MLLM-MSR", "target popularity", "popularity", "chance"]
    assert [row.name for row in first.rows] == names
    assert [row.name for row in second.rows] == names[1:]
    assert first.rows[0].cells[1:] == [None, None, None]
    assert "New</th><td>0.700 <small>0.600–0.800</small></td><td>not measured" in page(copy)
    for protocol in (first, second):
        (lead,) = [row for row in protocol.rows if row.lead]
        assert lead.name == "MLLM-MSR"
        assert lead.cells[0].value == metrics[protocol.sampling]["test"]["auc"]


def test_a_title_with_a_direction_override_affects_only_itself(tmp_path):
    title = "Turned \u202e about"
    html = page(write_report_world(tmp_path, {"f": title, "a": title}))
    outside = html.replace(f"<bdi>{title}</bdi>", "")
    assert outside != html
    assert re.search(rf">[^<]*{title}", outside) is None  # but for alternative texts


def test_a_pocket_result_is_marked_as_one(finished):
    assert "no claim about real data" in text(page(finished))
    real = text(page(finished, preprocess={"source": "tables"}))
    assert "no claim about real data" not in real
    assert "pocket_world" not in real


def test_a_dataset_of_the_paper_is_shown_with_the_papers_counts(finished):
    shown = describe_dataset(finished, make_settings(preprocess={"source": "microlens"}))
    rows = {count.name: (count.here, count.paper) for count in shown.counts}
    assert rows["Users"] == ("5", "25,411")
    assert rows["Interactions per user"] == ("4.80", "8.79; printed as 11.35")
    assert "second-hand" in page(finished, preprocess={"source": "microlens"})


@pytest.mark.parametrize("source", ["pocket", "tables"])
def test_other_datasets_are_not_compared_with_the_paper(finished, source):
    shown = describe_dataset(finished, make_settings(preprocess={"source": source}))
    assert not shown.compared
    assert "second-hand" not in page(finished, preprocess={"source": source})


def test_dropped_rows_are_counted(finished):
    counts = "9 interactions with low rating, 2 interactions of rare users"
    assert f"Dropped: {counts}." in text(page(finished))


def test_titles_are_not_called_preferences(finished):
    html = text(page(finished, infer_preferences={"mode": "none"}))
    assert "What the recommender reads: titles, no preference" in html
    assert "Preference that the recommender reads" not in html


def test_a_catalogue_without_images_says_so(copy):
    write_rows(Images, [], copy.images)
    html = page(copy)
    assert "This catalogue has no images." in html
    assert "<img" not in html


def test_a_run_without_training_says_so(copy):
    report = {"steps": 0, "epoch": 0, "valid_auc": None, "model": "x"}
    (copy.trained / "training.json").write_text(json.dumps(report))
    for curve in copy.trained.rglob("*.tsv"):
        curve.unlink()
    html = text(page(copy, sft={"epochs": 0}))
    assert "No training: this run is zero-shot." in html
    assert "the recommender is used zero-shot" in html


def test_the_page_says_what_a_probability_means(finished):
    html = text(page(finished))
    assert "A displayed probability of 60 % means: of 100 candidates" in html
    for title in ("Uniform negatives", "Negatives drawn from other users"):
        assert re.search(rf"{title}[^:]*: p\(yes\) is off by \d+\.\d percentage points", html)
    assert "It is Platt scaling, fitted on the validation candidates" in html
    assert "p(yes) is the model's own, raw; calibrated" in html.replace("&#39;", "'")


def test_a_run_without_calibration_says_that_p_yes_is_raw(copy):
    path = copy.evaluated / "metrics.json"
    metrics = json.loads(path.read_text())
    for sampling in ("uniform", "targets"):
        found = metrics[sampling]["calibration"]
        kept = ("candidates", "target_share", "ece", "brier")
        metrics[sampling]["calibration"] = {name: found[name] for name in kept}
    path.write_text(json.dumps(metrics))
    html = text(page(copy, evaluate={"calibration": "none"}))
    assert "It is shown as it is (evaluate.calibration: none)." in html
    assert "raw: not calibrated" in html
    assert "Calibrated" not in html
    assert "without validation candidates no scaling can be fitted" in text(page(copy))


def test_a_protocol_without_a_scaling_has_no_calibrated_errors(copy):
    path = copy.evaluated / "metrics.json"
    metrics = json.loads(path.read_text())
    found = metrics["targets"]["calibration"]
    kept = ("candidates", "target_share", "ece", "brier")
    metrics["targets"]["calibration"] = {name: found[name] for name in kept}
    path.write_text(json.dumps(metrics))
    assert "not fitted" in text(page(copy))


def test_too_few_sequences_for_the_stories_are_noted(finished):
    html = text(page(finished, report={"stories": 2}))
    assert "Only 1 of the test sequences is of this kind." in html
    assert "User u2 sequence 2 target at rank 1 of 3: Green cup" in html


def test_a_model_that_ranks_no_target_first_is_said_to_rank_none(copy):
    path = copy.evaluated / "per_sequence.parquet"
    last = [
        row | {"above": row["candidates"] - 1, "tied": 0}
        for row in read_rows(PerSequence, path, "sampling, scorer, sequence")
    ]
    write_rows(PerSequence, last, path)
    html = text(page(copy))
    assert "None of the test sequences is of this kind." in html


TABLE = """How many items to a block.

| block | AUC                  |
| ----- | -------------------- |
| 1     | 0.910 [0.890, 0.930] |
| <b>   | 0.920 [0.900, 0.940] |

- 150 test sequences
- pocket
"""


def test_studies_are_shown_from_their_folders(copy):
    folder = copy.studies / "block-size"
    folder.mkdir(parents=True)
    (folder / "figure.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "table.md").write_text(TABLE)
    (copy.studies / "empty").mkdir()
    (copy.studies / ".gitignore").touch()
    (study,) = read_studies(copy.studies)
    assert (study.name, study.about) == ("Block size", "How many items to a block.")
    assert study.notes == ["150 test sequences", "pocket"]
    html = page(copy)
    assert 'src="data:image/svg+xml;base64,' in html
    assert '<th scope="row">1</th><td>0.910 <small>0.890 to 0.930</small></td>' in html
    assert '<th scope="row">&lt;b&gt;</th><td>0.920 <small>0.900 to 0.940</small></td>' in html


def test_the_two_tables_of_a_study_are_two_tables(copy):
    folder = copy.studies / "cold-items"
    folder.mkdir(parents=True)
    strata = "| test | AUC, cold |\n| ---- | --------- |\n| VBPR | 0.5       |\n\n"
    (folder / "table.md").write_text(TABLE.replace("- 150", strata + "- 150"))
    (study,) = read_studies(copy.studies)
    assert [table[0][0] for table in study.tables] == ["block", "test"]
    assert study.tables[1] == [["test", "AUC, cold"], ["VBPR", "0.5"]]
    assert study.notes == ["150 test sequences", "pocket"]
    assert '<th scope="row">VBPR</th><td>0.5</td>' in page(copy)


def test_a_study_with_groups_has_its_labels_in_the_first_column(copy):
    folder = copy.studies / "table"
    folder.mkdir(parents=True)
    (folder / "table.md").write_text(TABLE.replace("block |", "group | block |"))
    (study,) = read_studies(copy.studies)
    assert study.tables[0][0][:2] == ["block", "group"]


def test_charts_show_a_few_curves_and_tables_show_all(copy):
    path = copy.evaluated / "metrics.json"
    metrics = json.loads(path.read_text())
    others = {
        name: {"auc": auc, "sequences": 3}
        for name, auc in zip("abcde", (3, 5, 1, 4, 2), strict=True)
    }
    metrics["uniform"] |= others
    path.write_text(json.dumps(metrics))
    curves = copy.evaluated / "plots/metrics_at_k.csv"
    header = curves.read_text().splitlines()[0].replace('"', "").split(",")
    row = {"sampling": "uniform", "k": "1", "hr": "0.5", "ndcg": "0.5", "mrr": "0.5"}
    more = [",".join((row | {"scorer": name})[column] for column in header) for name in others]
    curves.write_text(curves.read_text() + "\n".join(more) + "\n")
    curve = gather(copy, make_settings())["results"].protocols[0].curves[0]
    assert set(others) <= set(curve.figures)
    assert [name for name in others if f">{name}</text>" in curve.chart] == ["a", "b", "d"]


def test_a_study_without_figure_and_table_is_shown_as_text(copy):
    folder = copy.studies / "prompts"
    folder.mkdir(parents=True)
    (folder / "table.md").write_text("Nothing <i>yet</i>.\n")
    assert "<p>Nothing &lt;i&gt;yet&lt;/i&gt;.</p>" in page(copy)


def test_without_studies_there_is_no_such_section(finished):
    assert read_studies(finished.studies) == []
    assert 'id="studies"' not in page(finished)


def test_thumbnails_are_small_and_keep_their_shape(tmp_path):
    path = tmp_path / "images.parquet"
    write_rows(Images, [image_row("a", (300, 150)), image_row("b", (20, 30))], path)
    with Gallery(path) as gallery:
        large, small = (make_thumbnail(gallery, item, 100) for item in ("a", "b"))
        assert make_thumbnail(gallery, "c", 100) is None
        original = gallery.images([gallery.image_ref("b")])[0]
    shrunk, kept = (
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in (large, small)
    )
    assert shrunk.size == (100, 50)
    assert kept.convert("RGB").tobytes() == original.tobytes()


def test_every_setting_is_on_the_page(finished):
    html = page(finished)
    sections = dict(list_sections(make_settings()))
    assert sections["sft"]["lora.rank"] == "16"
    assert sections["summarize_items"]["revision"] == "null"
    for keys in sections.values():
        for key, value in keys.items():
            assert f"<dt>{key}</dt><dd>{value}</dd>" in html


def test_auc_by_stratum_is_shown_where_two_strata_have_enough_sequences(copy):
    path = copy.evaluated / "metrics.json"
    metrics = json.loads(path.read_text())
    assert 'id="strata"' not in page(copy)
    figures = {"auc": 0.7, "auc_low": 0.6, "auc_high": 0.8, "sequences": 30}
    scorers = metrics["uniform"].keys() - {"valid"}
    strata = {"cold": figures, "warm": figures | {"sequences": 1_234}}
    metrics["strata"] = {"uniform": dict.fromkeys(scorers, strata)}
    path.write_text(json.dumps(metrics))
    html = page(copy)
    assert 'id="strata"' in html
    assert "cold (30)" in html
    assert "warm (1,234)" in html


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"filter_sequences": {"history": "popular", "target": "popular"}}, "only counts popula"),
        ({"filter_sequences": {"test_negatives": 99}}, "among 99 negatives"),
        ({"filter_sequences": {"split": "leave_one_out"}}, "by time within each user"),
        ({"infer_preferences": {"mode": "direct"}}, "whole history is read in one prompt"),
        ({"infer_preferences": {"block_size": 5}}, "blocks of 5"),
        ({"sft": {"loss": "listwise"}}, "the target among its candidates"),
        ({"sft": {"epochs": 0}}, "zero-shot"),
        ({"recommender": {"model": "big", "revision": "c0ffee"}}, "big at c0ffee (recommender)"),
    ],
)
def test_the_protocol_follows_the_settings(changes, said):
    facts = " ".join(fact.text for fact in state_protocol(make_settings(**changes), scored=True))
    assert said in facts
    assert said not in " ".join(fact.text for fact in state_protocol(make_settings(), scored=True))


@pytest.mark.parametrize(
    ("lost", "stage"),
    [
        ("filtered/statistics.json", "filter_sequences"),
        ("trained/training.json", "sft"),
        ("evaluated/metrics.json", "evaluate"),
        ("evaluated/comparisons.parquet", "that writes it"),
    ],
)
def test_a_missing_input_is_one_line_and_leaves_the_earlier_page(copy, tmp_path, lost, stage):
    out = tmp_path / "report.html"
    out.write_text("earlier")
    folder, name = lost.split("/")
    (getattr(copy, folder) / name).unlink()
    with pytest.raises(DataError, match=f"run the stage {stage}"):
        write_report(copy, make_settings(), out)
    assert out.read_text() == "earlier"


# -- samplings and runs without a model ------------------------------------------------------------


def test_each_sampling_has_a_table_its_tests_and_its_curves(tmp_path):
    inputs = write_report_world(tmp_path, baselines={"item_knn": -1, "sasrec": 1})
    metrics = read_metrics(inputs.evaluated / "metrics.json")
    for protocol in gather(inputs, make_settings())["results"].protocols:
        aucs = [row.cells[0].value for row in protocol.rows if row.name != "chance"]
        assert aucs == sorted(aucs, reverse=True)
        assert protocol.rows[-1].name == "chance"
        assert protocol.valid.sequences == metrics[protocol.sampling]["valid"]["sequences"]
        assert protocol.non_personal == ["target popularity", "popularity"]
        assert {row.name for row in protocol.tests} == {"MLLM-MSR", "Item-kNN", "SASRec"}
        assert all(cell for row in protocol.tests for cell in row.cells)
        shown = [row.name for row in protocol.rows]
        assert list(protocol.curves[0].figures) == shown
        assert protocol.histogram is not None


def test_each_sampling_shows_its_number_of_sequences(finished):
    uniform, targets = gather(finished, make_settings())["results"].protocols
    assert {row.sequences for row in uniform.rows} == {3}
    assert {row.sequences for row in targets.rows} == {2}


def test_the_charts_of_all_samplings_share_an_axis(finished):
    first, second = gather(finished, make_settings())["results"].protocols
    ticks = [re.findall(r'class="tick"[^>]*>([^<]*)<', each.chart) for each in (first, second)]
    assert ticks[0] == ticks[1]


def test_stories_and_scores_are_of_the_first_sampling_and_say_so(finished):
    found = gather(finished, make_settings())
    assert found["shown_sampling"] == "uniform negatives"
    candidates = [each.candidates for each in found["distributions"].labels]
    assert sum(candidates) == 9  # three of each sequence
    assert {story.count for story in found["stories"].wrong} == {3}
    html = text(render(found))
    assert "from the history to the ranking among uniform negatives" in html
    assert "Which of the candidates (uniform negatives) are ranked first" in html


def test_a_run_of_baselines_alone_shows_them_and_nothing_of_a_model(tmp_path):
    inputs = write_report_world(tmp_path, baselines={"item_knn": 1}, scored=False)
    html = page(inputs)
    assert "<h1><bdi>Baselines on the pocket world</bdi></h1>" in html
    assert "No model was scored in this run on the pocket world" in text(html)
    for section in ("stories", "scores", "training"):
        assert f'id="{section}"' not in html
        assert f'href="#{section}"' not in html
    found = gather(inputs, make_settings())
    rows = [row.name for row in found["results"].protocols[0].rows]
    assert rows == ["Item-kNN", "target popularity", "popularity", "chance"]
    assert found["coverage"][0].name == "Ranked first by popularity"
    assert {fact.name for fact in found["protocol"]}.isdisjoint({"Preference", "Training"})


def test_a_run_without_model_and_baselines_says_so(tmp_path):
    html = text(page(write_report_world(tmp_path, scored=False)))
    assert "it measured baselines alone. None of them is personalised." in html


def test_warnings_come_before_the_verdict_and_every_figure(finished):
    html = render(gather(finished, make_settings(), warnings=["a <toy> model was run."]))
    start, _, rest = html.partition("A &lt;toy&gt; model was run.")
    assert 'class="verdict"' not in start
    assert 'class="verdict"' in rest
    assert 'class="warning"' not in page(finished)


def test_own_tables_are_called_what_their_owner_calls_them(finished):
    own = {"preprocess": {"source": "tables"}}
    named = page(finished, **own, report={"dataset": "Shop <2025>"})
    assert "<h1><bdi>MLLM-MSR on Shop &lt;2025&gt;</bdi></h1>" in named
    assert "5 users, 8 items, 24 interactions" in named
    assert "On Shop &lt;2025&gt;, MLLM-MSR" in named
    assert "MLLM-MSR on own tables" in page(finished, **own)
    prepared = page(finished, preprocess={"source": "prepared"}, report={"dataset": "Shop"})
    assert "MLLM-MSR on Shop" in prepared
    other = page(finished, preprocess={"source": "microlens"}, report={"dataset": "Shop"})
    assert "MLLM-MSR on MicroLens" in other


def test_a_user_id_is_text(copy):
    path = copy.filtered / "sequences.parquet"
    rows = [row | {"user": f"<b>{row['user']}"} for row in read_rows(Sequences, path, "sequence")]
    write_rows(Sequences, rows, path)
    html = page(copy)
    assert "User <bdi>&lt;b&gt;u2</bdi>" in html
    assert "<b>u2" not in html


# -- contrast (WCAG 2.2, 1.4.3) --------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Return the relative luminance of ``#rrggbb`` (WCAG 2.2, glossary)."""
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_every_colour_of_text_has_the_contrast_of_aa(mode):
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6});", blocks[mode]))
    assert len(colours) == 15
    for name in ("text", "muted", "accent", "new", "gone", *(f"s{n}" for n in range(6))):
        for ground in ("page", "card", "wash"):
            light, dark = sorted(map(luminance, (colours[name], colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)
