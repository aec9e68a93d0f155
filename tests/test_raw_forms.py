"""Runs from raw files in each publisher's format to metrics, with the pocket model.

The same data set of 9 items with images and 8 users with 6 interactions each is written in every
format. Only the presence of all outputs is checked, not the values of metrics.
"""

import csv
import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from families import draw_image

from mllm_msr.core.schemas import Images, Interactions, Preferences, Scores, Summaries
from mllm_msr.core.tables import read_rows
from stages.encode_items import encode_items
from stages.evaluate import evaluate
from stages.feature_baselines import feature_baselines
from stages.fetch_images import fetch_images
from stages.filter_sequences import filter_sequences
from stages.infer_preferences import infer_preferences
from stages.preprocess import preprocess
from stages.report import report
from stages.score import score
from stages.sft import sft
from stages.summarize_items import summarize_items

ROOT = Path(__file__).parents[1]
ITEMS = {f"{number:03}": f"Red kettle, no. {number}" for number in range(9)}
START, HOUR = 1_700_000_000_000, 3_600_000  # ms since 1970, ms
HISTORIES = {
    f"{user}": [f"{int(i):03}" for i in np.random.default_rng(user).permutation(9)[:6]]
    for user in range(1, 9)
}
INTERACTIONS = [
    (user, item, START + step * HOUR)
    for user, items in HISTORIES.items()
    for step, item in enumerate(items)
]
CHANGES = {
    "preprocess": {"allow_pocket_model": True},
    "filter_sequences": {
        **{"min_user_interactions": 1, "min_item_interactions": 1, "split": "leave_one_out"},
        **{"min_history": 2, "valid_negatives": 2, "test_negatives": 2},
        "evaluation_sampling": ["uniform"],
    },
    "summarize_items": {"max_new_tokens": 4},
    "infer_preferences": {"max_new_tokens": 4},
    "sft": {"epochs": 1, "validation_sequences": 2, "warmup_share": 0.0},
    "baselines": {"models": []},
    "feature_baselines": {"models": []},
    "text_baselines": {"models": []},
    "evaluate": {"bootstrap_samples": 10, "ks": [1]},
}


@pytest.fixture
def project(tmp_path: Path, responses: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert not responses.exists()
    settings = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for section in ("summarize_items", "encode_items", "infer_preferences", "recommender"):
        settings[section]["model"] = str(ROOT / "mllm_msr/pocket/model")
    for section, keys in CHANGES.items():
        settings[section] |= keys
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (tmp_path / "prompts.yaml").write_bytes((ROOT / "prompts.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def site(tmp_path: Path, serve: Callable[[Path], str]) -> str:
    """Serve images by HTTP."""
    draw_images(tmp_path / "site")
    return serve(tmp_path / "site")


def draw_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for item in ITEMS:
        draw_image(64, 64, seed=int(item)).save(folder / f"{item}.jpg")


def microlens_with_timestamps(raw: Path, _: str) -> None:
    write_csv(raw / "MicroLens-0k_pairs.csv", ("user", "item", "timestamp"), INTERACTIONS)
    write_csv(raw / "MicroLens-0k_titles.csv", ("item", "title"), ITEMS.items())
    draw_images(raw / "MicroLens-0k_covers")


def microlens_without_timestamps(raw: Path, _: str) -> None:
    lines = [f"{user}\t{' '.join(items)}\r\n" for user, items in HISTORIES.items()]
    (raw / "MicroLens-0k_pairs.tsv").write_bytes("".join(lines).encode())
    write_csv(raw / "MicroLens-0k_titles.csv", ("item", "title"), ITEMS.items())
    draw_images(raw.parent / "covers")
    with zipfile.ZipFile(raw / "MicroLens-0k_covers.zip", "w") as archive:
        for item in ITEMS:
            archive.write(raw.parent / "covers" / f"{item}.jpg", f"MicroLens-0k_covers/{item}.jpg")


def microlens_large_variant(raw: Path, _: str) -> None:
    write_csv(raw / "MicroLens-0M_pairs.csv", ("user", "item", "timestamp"), INTERACTIONS)
    titles = "".join(f'{item},"{title}\n' for item, title in ITEMS.items())
    (raw / "MicroLens-0M_title.csv").write_text(f"\ufeff{titles}", encoding="utf-8")
    draw_images(raw / "MicroLens-0M_covers")


def microlens_without_covers(raw: Path, _: str) -> None:
    write_csv(raw / "MicroLens-0k_pairs.csv", ("user", "item", "timestamp"), INTERACTIONS)
    write_csv(raw / "MicroLens-0k_titles.csv", ("item", "title"), ITEMS.items())


def amazon_as_published(raw: Path, site: str) -> None:
    image_refs = {i: [{"variant": "MAIN", "large": f"{site}/{i}.jpg"}] for i in ITEMS}
    write_lines(raw / "Baby_Products.jsonl", reviews())
    write_lines(raw / "meta_Baby_Products.jsonl", metadata(image_refs))


def amazon_by_the_hugging_face_loader(raw: Path, site: str) -> None:
    image_refs = {i: {"variant": ["MAIN"], "large": [f"{site}/{i}.jpg"]} for i in ITEMS}
    for name, rows in (("", reviews()), ("meta_", metadata(image_refs))):
        write_lines(raw / f"{name}Baby_Products.jsonl", rows)
        plain = raw / f"{name}Baby_Products.jsonl"
        plain.with_name(f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


def amazon_reviews_as_csv(raw: Path, site: str) -> None:
    amazon_as_published(raw, site)
    (raw / "Baby_Products.jsonl").unlink()
    header = ("user_id", "parent_asin", "rating", "timestamp")
    rows = [(user, item, 5.0, time) for user, item, time in INTERACTIONS]
    write_csv(raw / "Baby_Products.csv", header, rows)


def own_tables(raw: Path, site: str) -> None:
    write_csv(raw / "interactions.csv", ("user", "item", "timestamp"), INTERACTIONS)
    draw_images(raw / "images")
    images = [f"images/{i}.jpg" if int(i) % 2 else f"{site}/{i}.jpg" for i in ITEMS]
    rows = zip(ITEMS, ITEMS.values(), images, strict=True)
    write_csv(raw / "items.csv", ("item", "title", "image"), rows)


FORMS: dict[Callable[[Path, str], None], str] = {
    microlens_with_timestamps: "microlens",
    microlens_without_timestamps: "microlens",
    microlens_large_variant: "microlens",
    amazon_as_published: "amazon",
    amazon_by_the_hugging_face_loader: "amazon",
    amazon_reviews_as_csv: "amazon",
    own_tables: "tables",
}


@pytest.mark.slow
@pytest.mark.parametrize("write", FORMS, ids=lambda form: form.__name__)
def test_every_format_runs_through_the_pipeline(
    write: Callable[[Path, str], None], project: Path, site: str
) -> None:
    change(project, "preprocess", source=FORMS[write])
    raw = project / "data" / "raw" / FORMS[write]
    raw.mkdir(parents=True)
    write(raw, site)

    preprocess()
    data = project / "data"
    interactions = read_rows(
        Interactions, data / "preprocess/interactions.parquet", '"user", position'
    )
    assert {(row["user"], row["item"]) for row in interactions} == {
        (u, i) for u, i, _ in INTERACTIONS
    }
    filter_sequences()
    fetch_images(allow_private=True)
    assert len(list(read_rows(Images, data / "fetch_images/images.parquet", "item"))) == len(ITEMS)
    summarize_items()
    summaries = list(read_rows(Summaries, data / "summarize_items/summaries.parquet", "item"))
    assert [row["item"] for row in summaries] == list(ITEMS)
    assert all(row["text_summary"] and row["image_description"] for row in summaries)
    run_model_stages(data)


@pytest.mark.slow
def test_a_release_without_covers_runs_on_text_alone(project: Path) -> None:
    raw = project / "data" / "raw" / "microlens"
    raw.mkdir(parents=True)
    microlens_without_covers(raw, "")
    small = {"width": 4, "epochs": 1}
    change(project, "preprocess", source="microlens", microlens={"covers": "optional"})
    change(project, "feature_baselines", models=["gru4rec_f"])
    change(project, "feature_baselines", gru4rec_f=settings_of(project, "gru4rec_f") | small)

    preprocess()
    filter_sequences()
    fetch_images()
    summarize_items()
    data = project / "data"
    summaries = list(read_rows(Summaries, data / "summarize_items/summaries.parquet", "item"))
    assert all(row["text_summary"] == row["summary"] for row in summaries)
    encode_items()
    feature_baselines("gru4rec_f")
    run_model_stages(data)
    metrics = json.loads((data / "evaluate/metrics.json").read_text(encoding="utf-8"))
    assert 0 <= metrics["uniform"]["gru4rec_f"]["auc"] <= 1
    report()
    assert (data / "report/report.html").is_file()


def run_model_stages(data: Path) -> None:
    """Run the stages from infer_preferences to evaluate."""
    infer_preferences()
    preferences = list(
        read_rows(Preferences, data / "infer_preferences/preferences.parquet", "sequence")
    )
    assert {row["sequence"] for row in preferences} == set(range(8 * 3))
    sft()
    score()
    assert len(list(read_rows(Scores, data / "score/scores.parquet", "item"))) == 8 * 3 * 2
    evaluate()
    metrics = json.loads((data / "evaluate/metrics.json").read_text(encoding="utf-8"))
    assert 0 <= metrics["uniform"]["test"]["auc"] <= 1


def change(project: Path, section: str, **keys: object) -> None:
    settings = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    settings[section] |= keys
    (project / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def settings_of(project: Path, baseline: str) -> dict[str, object]:
    settings = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    found: dict[str, object] = settings["feature_baselines"][baseline]
    return found


def reviews() -> list[dict[str, object]]:
    return [
        {"user_id": user, "parent_asin": item, "timestamp": time, "rating": 5.0, "text": "Nice"}
        for user, item, time in INTERACTIONS
    ]


def metadata(image_refs: dict[str, object]) -> list[dict[str, object]]:
    rest = {"description": ["<b>For</b> tea."], "features": [], "price": "None", "details": "{}"}
    return [
        {"parent_asin": item, "title": title, "images": image_refs[item], **rest}
        for item, title in ITEMS.items()
    ]


def write_csv(path: Path, header: tuple[str, ...], rows: object) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])  # type: ignore[misc]


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
