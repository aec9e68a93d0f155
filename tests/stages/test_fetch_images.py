"""The stage fetch_images: its tables, its errors, and files outside the raw folder."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mllm_msr.core.schemas import FailedImages, Images, ImageSources
from mllm_msr.core.tables import read_rows, write_rows

PROJECT = Path(__file__).parents[2]
FILES = ["failures.parquet", "fetched.json", "images.parquet"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three images: in a folder, in an archive, and on the web."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "site").mkdir()
    for name in ("folder.png", "site/web.png"):
        (tmp_path / name).write_bytes(noise())
    with zipfile.ZipFile(tmp_path / "covers.zip", "w") as archive:
        archive.writestr("covers/zipped.png", noise())
    return tmp_path


@pytest.fixture
def server(place, serve):
    return serve(place / "site")


def noise() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (100, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_image_sources(place: Path, server: str = "") -> None:
    nowhere = {"file": None, "member": None, "url": None}
    zipped = {"file": str(place / "covers.zip"), "member": "covers/zipped.png"}
    rows = [
        nowhere | {"item": "1", "file": str(place / "folder.png")},
        nowhere | {"item": "2"} | zipped,
    ]
    if server:
        rows.append(nowhere | {"item": "3", "url": f"{server}/web.png"})
    write_rows(ImageSources, rows, place / "image_sources.parquet")


@pytest.fixture
def call(place, run_stage):
    def run(*options: str, share: float = 0) -> subprocess.CompletedProcess[str]:
        return run_stage("fetch_images", *words(place, share), *options)

    return run


def words(place: Path, share: float = 0) -> list[object]:
    params = place / "params.yaml"
    params.write_text(f"fetch_images: {{image_side: 80, failed_share: {share}}}\n")
    sources, out = place / "image_sources.parquet", place / "out"
    return ["--image-sources", sources, "--out", out, "--params", params, "--raw", place]


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((place / "out").iterdir())}


def test_images_come_from_a_folder_an_archive_and_the_web(place, server, call):
    write_image_sources(place, server)
    result = call("--allow-private")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"wrote {place}/out: 3 images; 0 failed\n"
    images = list(read_rows(Images, place / "out" / "images.parquet", "item"))
    assert [(row["item"], row["width"], row["height"]) for row in images] == [
        ("1", 40, 80),
        ("2", 40, 80),
        ("3", 40, 80),
    ]
    assert len({row["digest"] for row in images}) == 1
    assert list(contents(place)) == FILES


def test_fetched_images_are_not_requested_again(place, server, call):
    write_image_sources(place, server)
    assert call("--allow-private").returncode == 0
    before = contents(place)
    (place / "site" / "web.png").unlink()
    assert call("--allow-private").returncode == 0
    assert contents(place) == before


def test_a_private_address_is_refused_unless_allowed(place, server, call):
    write_image_sources(place, server)
    result = call()
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: {server}/web.png (item 3): expected an image; got refused address, tried once;"
        " correct its URL, or let some fail: fetch_images.failed_share; the images that failed"
        f" until then are in {place}/.mllm_msr/images/failures.parquet"
    )
    assert not (place / "out").exists()


def test_allowed_failures_are_counted_and_listed(place, server, call):
    write_image_sources(place, server)
    (place / "folder.png").write_bytes(b"")
    (place / "site" / "web.png").unlink()
    result = call("--allow-private", share=0.7)
    assert result.returncode == 0, result.stderr
    assert list(read_rows(FailedImages, place / "out" / "failures.parquet", "item")) == [
        {"item": "1", "place": f"{place}/folder.png", "reason": "an empty file"},
        {"item": "3", "place": f"{server}/web.png", "reason": "not found, tried once"},
    ]
    assert json.loads((place / "out" / "fetched.json").read_text()) == {
        "sources": 3,
        "images": 1,
        "failed": 2,
    }


def test_too_many_failed_files_are_listed_in_a_table(place, call):
    write_image_sources(place)
    for name in ("folder.png", "covers.zip"):
        (place / name).write_bytes(b"")
    result = call(share=0.5)
    assert result.returncode == 1
    listed = place / ".mllm_msr" / "images" / "failures.parquet"
    assert result.stderr.splitlines()[-1].endswith(
        f"; the images that failed until then are in {listed}"
    )
    assert [(row["item"], row["reason"]) for row in read_rows(FailedImages, listed, "item")] == [
        ("1", "an empty file"),
        ("2", "a damaged zip file"),
    ]
    assert not list((place / "out").glob("*"))


def test_too_many_failed_urls_are_listed_in_a_table(place, server, call):
    nowhere = {"file": None, "member": None}
    rows = [nowhere | {"item": f"{i:03}", "url": f"{server}/{i}.png"} for i in range(60)]
    write_rows(ImageSources, rows, place / "image_sources.parquet")
    result = call("--allow-private", share=0.1)
    assert result.returncode == 1
    assert "expected at most 6 of 60 images to fail" in result.stderr
    listed = place / ".mllm_msr" / "images" / "failures.parquet"
    assert str(listed) in result.stderr.splitlines()[-1]
    failed = list(read_rows(FailedImages, listed, "item"))
    assert len(failed) == 60
    assert {row["reason"] for row in failed} == {"not found, tried once"}


def test_all_dead_urls_are_listed_where_none_may_fail(place, server, call):
    nowhere = {"file": None, "member": None}
    rows = [nowhere | {"item": f"{i:03}", "url": f"{server}/{i}.png"} for i in range(30)]
    rows.append(nowhere | {"item": "web", "url": f"{server}/web.png"})
    write_rows(ImageSources, rows, place / "image_sources.parquet")
    result = call("--allow-private", share=0)
    assert result.returncode == 1
    listed = place / ".mllm_msr" / "images" / "failures.parquet"
    assert "expected at most 0 of 31 images to fail; got 30, the last with" in result.stderr
    assert result.stderr.splitlines()[-1].endswith(f" are in {listed}")
    failed = [row["item"] for row in read_rows(FailedImages, listed, "item")]
    assert failed == [row["item"] for row in rows[:30]]


def test_dead_urls_at_the_start_are_judged_by_the_share_of_all_images(place, server, call):
    for number in range(40, 100):
        (place / "site" / f"{number}.png").write_bytes(noise())
    nowhere = {"file": None, "member": None}
    rows = [nowhere | {"item": f"{i:03}", "url": f"{server}/{i}.png"} for i in range(100)]
    write_rows(ImageSources, rows, place / "image_sources.parquet")
    result = call("--allow-private", share=0.4)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"wrote {place}/out: 60 images; 40 failed\n"


def test_the_next_run_removes_the_table_of_failures(place, call):
    write_image_sources(place)
    (place / "folder.png").write_bytes(b"")
    assert call(share=0.1).returncode == 1
    (place / "folder.png").write_bytes(noise())
    assert call(share=0.1).returncode == 0
    assert not (place / ".mllm_msr" / "images" / "failures.parquet").exists()


def test_many_images_are_one_file_in_the_dvc_cache(place):
    """Run a pipeline of this stage alone, with its outputs in dvc.yaml."""
    (place / "data" / "filter_sequences").mkdir(parents=True)
    nowhere = {"member": None, "url": None}
    rows = [nowhere | {"item": f"{i:03}", "file": str(place / "folder.png")} for i in range(200)]
    write_rows(ImageSources, rows, place / "data" / "filter_sequences" / "image_sources.parquet")
    (place / "params.yaml").write_text("fetch_images: {image_side: 80, failed_share: 0}\n")
    shipped = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]["fetch_images"]
    stage = {"cmd": f"{sys.executable} -m stages.fetch_images --raw .", "outs": shipped["outs"]}
    (place / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"fetch_images": stage}}))
    for words in (["init", "--no-scm", "--quiet"], ["repro"]):
        subprocess.run(
            [sys.executable, "-m", "dvc", *words],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(PROJECT), "DVC_NO_ANALYTICS": "1"},
            check=True,
            capture_output=True,
        )
    folder = place / "data" / "fetch_images"
    assert len(list(read_rows(Images, folder / "images.parquet", "item"))) == len(rows)
    stored = [path for path in (place / ".dvc" / "cache" / "files").rglob("*") if path.is_file()]
    written = {(folder / name).read_bytes() for name in ("images.parquet", "failures.parquet")}
    assert {path.read_bytes() for path in stored} == written
    assert len(stored) == 2


@pytest.mark.parametrize("linked", ["elsewhere", "inside"])
def test_a_link_out_of_the_raw_folder_is_refused(place, tmp_path_factory, linked, call):
    write_image_sources(place)
    elsewhere = {"elsewhere": tmp_path_factory.mktemp("other"), "inside": place / "covers"}[linked]
    elsewhere.mkdir(exist_ok=True)
    (place / "folder.png").rename(elsewhere / "folder.png")
    (place / "folder.png").symlink_to(elsewhere / "folder.png")
    result = call()
    if linked == "inside":
        assert result.returncode == 0, result.stderr
        return
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: {place}/folder.png (item 1): expected a valid image (JPEG, PNG, WEBP, GIF, BMP,"
        f" TIFF, AVIF); got a path or link that leads out of {place}; put the file itself there, or"
        " make the folder itself the link, or let some fail: fetch_images.failed_share"
    )
    assert call(share=0.5).returncode == 0
    assert [row["item"] for row in read_rows(Images, place / "out/images.parquet", "item")] == ["2"]


def test_the_raw_folder_may_be_a_link(place, call):
    inside = place / "inside"
    inside.mkdir()
    (place / "folder.png").rename(inside / "folder.png")
    (place / "linked").symlink_to(inside)
    rows = [{"item": "1", "file": str(place / "linked" / "folder.png"), "member": None}]
    write_rows(ImageSources, [rows[0] | {"url": None}], place / "image_sources.parquet")
    assert call("--raw", str(place / "linked")).returncode == 0


def test_an_image_linked_to_the_dvc_cache_is_read(place, call):
    write_image_sources(place)
    cache = place / ".dvc" / "cache" / "files"
    cache.mkdir(parents=True)
    raw = place / "raw"
    raw.mkdir()
    (place / "folder.png").rename(cache / "0123")
    (raw / "folder.png").symlink_to(cache / "0123")
    rows = [{"item": "1", "file": str(raw / "folder.png"), "member": None, "url": None}]
    write_rows(ImageSources, rows, place / "image_sources.parquet")
    result = call("--raw", str(raw))
    assert result.returncode == 0, result.stderr


def test_a_named_pipe_does_not_block_the_stage(place, call):
    write_image_sources(place)
    (place / "folder.png").unlink()
    os.mkfifo(place / "folder.png")
    result = call()
    assert result.returncode == 1
    assert "folder.png (item 1): expected a valid image" in result.stderr
    assert "got a named pipe; replace it" in result.stderr


def test_a_bad_image_is_a_one_line_error_and_keeps_earlier_tables(place, call):
    write_image_sources(place)
    assert call().returncode == 0
    before = contents(place)
    (place / "folder.png").write_bytes(b"no image")
    result = call()
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"error: {place}/folder.png (item 1): expected a valid image (JPEG, PNG, WEBP, GIF, BMP,"
        " TIFF, AVIF); got text; replace it, or let some fail: fetch_images.failed_share"
    )
    assert contents(place) == before


def test_a_full_disk_is_a_one_line_error_and_keeps_earlier_tables(
    place, call, run_stage_on_a_full_disk
):
    write_image_sources(place)
    assert call().returncode == 0
    before = contents(place)
    result = run_stage_on_a_full_disk("fetch_images", *words(place), limit=8_000)
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr
    assert "got a full disk; free some space" in result.stderr
    assert contents(place) == before


def test_no_image_sources_give_an_empty_table(place, call):
    write_rows(ImageSources, [], place / "image_sources.parquet")
    result = call()
    assert result.stdout == f"wrote {place}/out: 0 images; 0 failed\n"


def test_equal_images_give_equal_tables(place, call):
    write_image_sources(place)
    call()
    before = contents(place)
    call()
    assert contents(place) == before
