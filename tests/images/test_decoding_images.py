"""Decoding of images of every format, and errors for damaged or hostile files."""

import contextlib
import hashlib
import io
import math
import os
import socket
import struct
import threading
import time
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from mllm_msr.core.errors import DataError
from mllm_msr.core.schemas import Images
from mllm_msr.core.tables import read_rows
from mllm_msr.images import decoding
from mllm_msr.images.decoding import (
    MAX_ASPECT,
    MAX_PIXELS,
    Failures,
    ImageLocation,
    decode,
    encode,
    max_failures,
    write_images,
)

RED, WHITE = (200, 30, 40), (255, 255, 255)


def write(files: list[ImageLocation], path: Path) -> int:
    """Write a table of images in which none may fail."""
    return write_images(files, path, 64, Failures(len(files), 0))


def red(size=(20, 10), mode="RGB", colour=RED) -> Image.Image:
    return Image.new(mode, size, colour)


def recoded(image: Image.Image, file: Path, side: int = 64, **options: object) -> Image.Image:
    image.save(file, **options)
    image, size = encode(file, side)
    result = decode(image)
    assert result.size == size
    assert result.mode == "RGB"
    return result


def near(pixel, expected, by=0) -> bool:
    return all(abs(a - b) <= by for a, b in zip(pixel, expected, strict=True))


def test_a_small_image_keeps_every_pixel(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (13, 29, 3), dtype=np.uint8)
    result = recoded(Image.fromarray(noise), tmp_path / "a.png")
    assert np.array_equal(np.asarray(result), noise)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((300, 100), (64, 21)), ((100, 300), (21, 64)), ((64, 64), (64, 64)), ((5000, 1), (64, 1))],
)
def test_the_longer_side_is_limited_and_the_aspect_ratio_kept(tmp_path, size, expected):
    assert recoded(red(size), tmp_path / "a.png").size == expected


def test_equal_pixels_give_equal_bytes_whatever_the_metadata(tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "taken at home")
    red().save(tmp_path / "plain.png")
    red().save(tmp_path / "noted.png", pnginfo=note, icc_profile=b"profile", dpi=(300, 300))
    assert encode(tmp_path / "plain.png", 64) == encode(tmp_path / "noted.png", 64)


def photograph(size: tuple[int, int] = (96, 128)) -> Image.Image:
    """Draw soft shapes with sensor noise."""
    generator = np.random.default_rng(1)
    shapes = generator.integers(0, 256, (4, 3, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(shapes).resize(size, Image.Resampling.BICUBIC))
    grain = generator.normal(0, 4, soft.shape)
    return Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("form", "stored"),
    [("jpeg", "JPEG"), ("png", "WEBP"), ("webp", "WEBP"), ("gif", "WEBP"), ("bmp", "WEBP")],
)
def test_only_a_jpeg_is_stored_as_jpeg(tmp_path, form, stored):
    photograph().save(tmp_path / "a", form)
    image, _ = encode(tmp_path / "a", 64)
    assert Image.open(io.BytesIO(image)).format == stored
    if stored == "WEBP":
        assert image[12:16] == b"VP8L"  # lossless


def test_a_stored_photograph_is_smaller_and_nearly_unchanged(tmp_path):
    photograph().save(tmp_path / "a.jpg", quality=90)
    shown = Image.open(tmp_path / "a.jpg")
    shown.save(tmp_path / "a.png")
    (small, _), (whole, _) = encode(tmp_path / "a.jpg", 256), encode(tmp_path / "a.png", 256)
    assert len(small) < 0.6 * len(whole)
    difference = np.asarray(decode(small), float) - np.asarray(shown, float)
    assert 10 * np.log10(255**2 / (difference**2).mean()) > 38  # decibels


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((90, 160), (45, 80)),  # 80 pixels are enough for 42, 40 are not
        ((160, 90), (80, 45)),
        ((300, 300), (75, 75)),
        ((140, 140), (140, 140)),  # 70 pixels would be too few
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_suffices(
    tmp_path, monkeypatch, size, decoded
):
    sizes = []
    thumbnail = Image.Image.thumbnail
    monkeypatch.setattr(
        Image.Image,
        "thumbnail",
        lambda image, *args: (sizes.append(image.size), thumbnail(image, *args))[1],
    )
    side = 42
    photograph(size).save(tmp_path / "a.jpg", quality=85)
    _, shrunk = encode(tmp_path / "a.jpg", side)
    assert sizes == [decoded]
    assert max(shrunk) == side


def test_decoding_at_a_lower_scale_changes_less_than_storing(tmp_path, monkeypatch):
    photograph((720, 1280)).save(tmp_path / "a.jpg", quality=85)
    drafted, _ = encode(tmp_path / "a.jpg", 336)
    monkeypatch.setattr(decoding, "MIN_DRAFT_RATIO", math.inf)
    full, _ = encode(tmp_path / "a.jpg", 336)
    assert drafted != full
    difference = np.asarray(decode(drafted), float) - np.asarray(decode(full), float)
    assert np.abs(difference).mean() < 1.5


def test_a_member_of_another_size_than_declared_is_read_within_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_BYTES", 1_000_000)
    path, size = tmp_path / "covers.zip", 60_000_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(size))
    data = path.read_bytes()
    assert data.count(struct.pack("<I", size)) == 2  # before the member, and in the directory
    path.write_bytes(data.replace(struct.pack("<I", size), struct.pack("<I", 1_000)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="a damaged member"):
            encode(path, 64, "a.png")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_members_of_alternating_archives_are_read_from_open_ones(tmp_path, monkeypatch):
    opened = []
    open_zip = decoding.open_zip
    monkeypatch.setattr(decoding, "open_zip", lambda s: opened.append(s) or open_zip(s))
    for name in "ab":
        red().save(tmp_path / "a.png")
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.write(tmp_path / "a.png", "a.png")
    for _ in range(3):
        for name in "ab":
            encode(tmp_path / f"{name}.zip", 64, "a.png")
    assert len(opened) == 2


def test_images_that_are_decoded_at_once_have_no_more_pixels_than_allowed():
    budget, running, most, lock = decoding.PixelBudget(100), 0, 0, threading.Lock()

    def decode_one(pixels: int) -> None:
        nonlocal running, most
        with budget.take(pixels):
            with lock:
                running += min(pixels, 100)
                most = max(most, running)
            time.sleep(0.001)
            with lock:
                running -= min(pixels, 100)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(decode_one, [30, 60, 500, 10, 90, 40, 100] * 12))
    assert running == 0
    assert 90 <= most <= 100


def test_a_damaged_avif_is_an_error_for_users(tmp_path):
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    whole = io.BytesIO()
    image.save(whole, "AVIF")
    for _ in range(60):
        damaged = bytearray(whole.getvalue())
        for place in generator.integers(0, len(damaged), 4):
            damaged[place] = generator.integers(0, 256)
        (tmp_path / "a.avif").write_bytes(damaged)
        with contextlib.suppress(DataError):
            encode(tmp_path / "a.avif", 64)


def test_rows_keep_the_order_of_the_images_whatever_their_sizes(tmp_path):
    files = []
    for number in range(60):
        side = 900 if number % 7 == 0 else 10  # large ones finish after those that follow
        red((side, side)).save(tmp_path / f"{number}.png")
        files.append(ImageLocation(f"{number:02}", tmp_path / f"{number}.png"))
    write(files, tmp_path / "out.parquet")
    stored = arrow.parquet.read_table(tmp_path / "out.parquet", columns=["item"])
    assert stored["item"].to_pylist() == [each.item for each in files]


def test_cmyk_becomes_rgb(tmp_path):
    image = red(mode="CMYK", colour=(0, 255, 255, 0))
    assert near(recoded(image, tmp_path / "a.jpg").getpixel((5, 5)), (255, 0, 0), by=8)


def test_a_transparent_palette_gets_a_white_background(tmp_path):
    image = Image.new("P", (20, 10), 0)
    image.putpalette([*RED, 0, 0, 0])
    image.paste(1, (10, 0, 20, 10))
    result = recoded(image, tmp_path / "a.png", transparency=1)
    assert (result.getpixel((2, 5)), result.getpixel((15, 5))) == (RED, WHITE)


def test_half_transparent_pixels_are_blended_with_white(tmp_path):
    result = recoded(red(mode="RGBA", colour=(0, 0, 0, 128)), tmp_path / "a.png")
    assert near(result.getpixel((5, 5)), (127, 127, 127), by=1)


def test_transparent_grey_gets_a_white_background(tmp_path):
    result = recoded(red(mode="LA", colour=(10, 0)), tmp_path / "a.png")
    assert result.getpixel((5, 5)) == WHITE


def test_16_bit_grey_levels_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 20 * 10).astype(np.uint16).reshape(10, 20)
    for name in ("a.png", "a.tif"):
        result = np.asarray(recoded(Image.fromarray(ramp), tmp_path / name))
        assert np.abs(result[..., 0].astype(int) - ramp // 256).max() <= 1


def test_16_bit_colours_are_scaled_not_clipped(tmp_path):
    pixel = struct.pack(">3H", 65535, 32768, 256)
    lines = b"".join(b"\0" + pixel * 4 for _ in range(3))
    (tmp_path / "a.png").write_bytes(png(4, 3, 16, lines))
    assert decode(encode(tmp_path / "a.png", 64)[0]).getpixel((1, 1)) == (255, 128, 1)


def test_black_and_white_becomes_rgb(tmp_path):
    assert recoded(red(mode="1", colour=1), tmp_path / "a.png").getpixel((5, 5)) == WHITE


def test_32_bit_pixels_are_refused(tmp_path):
    red(mode="F", colour=0.5).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: expected a valid image .*mode F"):
        encode(tmp_path / "a.tif", 64)


@pytest.mark.parametrize("form", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_used(tmp_path, form):
    others = [red(colour=(0, 0, 255)), red(colour=(0, 255, 0))]
    options = {"save_all": True, "append_images": others}
    result = recoded(red(), tmp_path / f"a.{form}", **options)
    assert near(result.getpixel((5, 5)), RED, by=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_rotated_by_its_exif_orientation(tmp_path, orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose
    upright = red((32, 16), colour=WHITE)
    upright.paste(RED, (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    result = recoded(stored, tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(result), np.asarray(upright))


def test_a_large_photo_is_shrunk_accurately(tmp_path):
    across = np.linspace(0, 255, 1600).astype(np.uint8)
    photo = Image.fromarray(np.stack([np.tile(across, (1200, 1))] * 3, axis=-1))
    result = np.asarray(recoded(photo, tmp_path / "a.jpg", 64, quality=95)).astype(int)
    assert result.shape == (48, 64, 3)
    assert np.abs(result[24, :, 0] - (np.arange(64) * 4 + 2)).max() <= 4


BROKEN = {
    "missing": (None, "no such file"),
    "zero bytes": (b"", "an empty file"),
    "a web page": (b"<html>404 not found</html>", "HTML"),
    "a web page after a mark": (b"\xef\xbb\xbf\n<!DOCTYPE HTML>\n<title>", "HTML"),
    "another format": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "PostScript"),
    "a drawing": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "a drawing alone": (b"<svg width='4' height='4'></svg>", "SVG"),
    "a telephone's photograph": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC"),
    "a video": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(40), "MP4"),
    "a damaged AVIF": (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(9), "a damaged AVIF file"),
    "a damaged WebP": (b"RIFF\x10\0\0\0WEBP and so on", "a damaged WEBP file"),
    "JPEG XL": (b"\xff\x0a" + bytes(30), "JPEG XL"),
    "text": (b"see the other folder\n", "text"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4\n",
        "a Git LFS pointer",
    ),
    "zeros": (bytes(2_000), "bytes of no known format"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_other_files_are_refused_with_their_format(tmp_path, what):
    content, got = BROKEN[what]
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jpg: expected a valid image .*got {got}") as error:
        encode(tmp_path / "a.jpg", 64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["jpeg", "png", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_image_is_refused(tmp_path, form):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, form)
    (tmp_path / "a").write_bytes(whole.getvalue()[: whole.tell() // 2])
    with pytest.raises(DataError, match="expected a valid image"):
        encode(tmp_path / "a", 64)


@pytest.mark.parametrize("side", [10_000, 50_000])
@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    (tmp_path / "a.png").write_bytes(png(side, side, 8, b""))  # the pixels are not even there
    with pytest.raises(DataError, match=r"89,478,485 pixels") as error:
        write([ImageLocation("1", tmp_path / "a.png")], tmp_path / "out.parquet")
    assert side * side > MAX_PIXELS
    assert not (tmp_path / "out.parquet").exists()
    assert "fetch_images.failed_share" in str(error.value)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["jpeg", "png", "gif", "bmp", "tiff", "webp"]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_bytes_give_an_image_or_a_user_error(tmp_path, form, damage):
    whole = io.BytesIO()
    red((24, 24)).save(whole, form)
    content = bytearray(whole.getvalue())
    for place, value in damage:
        content[place % len(content)] = value
    (tmp_path / "a").write_bytes(content)
    try:
        image, size = encode(tmp_path / "a", 16)
    except DataError:
        return
    assert decode(image).size == size
    assert max(size) <= 16


def test_the_table_holds_each_image_with_size_and_digest(tmp_path):
    files = [ImageLocation(str(number), tmp_path / f"{number}.png") for number in range(3)]
    for number, located in enumerate(files):
        red((10 + number, 5)).save(located.file)
    assert write(files, tmp_path / "out.parquet") == 3
    rows = list(read_rows(Images, tmp_path / "out.parquet", "item"))
    assert [(row["item"], row["width"], row["height"]) for row in rows] == [
        ("0", 10, 5),
        ("1", 11, 5),
        ("2", 12, 5),
    ]
    assert all(row["digest"] == hashlib.sha256(row["image"]).hexdigest() for row in rows)


def test_equal_files_give_an_equal_table(tmp_path):
    red().save(tmp_path / "a.png")
    for name in ("one", "two"):
        write([ImageLocation("a", tmp_path / "a.png")], tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_bad_files_are_dropped_counted_and_logged(tmp_path, caplog):
    red().save(tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    files = [ImageLocation(name, tmp_path / f"{name}.png") for name in ("a", "b", "c")]
    failures = Failures(3, 0.7)
    assert write_images(files, tmp_path / "out.parquet", 64, failures) == 1
    assert failures.rows == [
        {"item": "b", "place": str(tmp_path / "b.png"), "reason": "an empty file"},
        {"item": "c", "place": str(tmp_path / "c.png"), "reason": "no such file"},
    ]
    assert "b.png: expected a valid image" in caplog.text
    assert "c.png: expected a valid image" in caplog.text


def test_the_share_of_images_that_may_fail_is_exact():
    assert max_failures(0.29, 100) == 29
    assert max_failures(0.295, 100) == 29
    assert max_failures(0.0, 100) == 0
    assert max_failures(1.0, 3) == 3


def test_too_many_failures_are_an_error(tmp_path):
    red().save(tmp_path / "a.png")
    files = [ImageLocation(name, tmp_path / f"{name}.png") for name in ("a", "b", "c", "d")]
    with pytest.raises(DataError, match=r"at most 2 of 4 images to fail; got 3, the last with no"):
        write_images(files, tmp_path / "out.parquet", 64, Failures(4, 0.5))
    assert not (tmp_path / "out.parquet").exists()


def test_images_are_read_from_an_archive(tmp_path):
    red().save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "covers.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "a.png", "covers/a.png")
        archive.writestr("covers/b.png", b"")
        archive.writestr("covers/c.png", bytes(100_000_000))
    assert encode(tmp_path / "covers.zip", 64, "covers/a.png") == encode(tmp_path / "a.png", 64)
    members = [ImageLocation(n, tmp_path / "covers.zip", f"covers/{n}.png") for n in "abcd"]
    failures = Failures(4, 0.8)
    assert write_images(members, tmp_path / "out.parquet", 64, failures) == 1
    assert [row["place"] for row in failures.rows] == [
        f"{tmp_path}/covers.zip, covers/{name}.png" for name in "bcd"
    ]
    assert [row["reason"] for row in failures.rows] == [
        "an empty file",
        "more than 64,000,000 bytes",
        "no such file",
    ]


def patch_zip(archive: Path, offsets: dict[bytes, int], value: int) -> None:
    """Overwrite two bytes of the first header of each kind, at an offset from its signature."""
    content = bytearray(archive.read_bytes())
    for signature, offset in offsets.items():
        struct.pack_into("<H", content, content.index(signature) + offset, value)
    archive.write_bytes(content)


FLAGS = {b"PK\x03\x04": 6, b"PK\x01\x02": 8}  # offsets of APPNOTE.TXT, 4.3.7 and 4.3.12
METHOD = {b"PK\x03\x04": 8, b"PK\x01\x02": 10}
BAD_MEMBERS = {
    "encrypted": (FLAGS, 0x1, "an encrypted member"),
    "encrypted strongly": (FLAGS, 0x41, "an encrypted member"),
    "patched": (FLAGS, 0x20, "a damaged member"),
    "Deflate64": (METHOD, 9, "a member compressed with Deflate64"),
    "bzip2": (METHOD, 12, "a member compressed with bzip2"),
    "Zstandard": (METHOD, 93, "a member compressed with Zstandard"),
    "an unknown method": (METHOD, 77, "a member compressed with method 77"),
    "no deflate": (METHOD, 8, "a damaged member"),
    "a wrong checksum": ({b"PK\x01\x02": 16}, 1, "a damaged member"),
    "truncated": ({b"PK\x01\x02": 20}, 40, "a damaged member"),  # fewer bytes than unpacked
    "a header elsewhere": ({b"PK\x01\x02": 42}, 11, "a damaged member"),
}


@pytest.mark.parametrize("what", BAD_MEMBERS)
def test_an_unreadable_member_is_refused_or_counted(tmp_path, what):
    offsets, value, got = BAD_MEMBERS[what]
    red().save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "covers.zip", "w") as archive:
        for name in ("covers/1.png", "covers/2.png"):
            archive.write(tmp_path / "a.png", name)
    patch_zip(tmp_path / "covers.zip", offsets, value)
    with pytest.raises(
        DataError, match=rf"covers\.zip, covers/1\.png: expected .*got {got}"
    ) as error:
        encode(tmp_path / "covers.zip", 64, "covers/1.png")
    assert "archive" in str(error.value)
    assert "\n" not in str(error.value)
    members = [ImageLocation(n, tmp_path / "covers.zip", f"covers/{n}.png") for n in "12"]
    failures = Failures(2, 1.0)
    assert write_images(members, tmp_path / "out.parquet", 64, failures) == 1
    assert [(row["item"], row["reason"]) for row in failures.rows] == [("1", got)]


def test_a_damaged_directory_of_an_archive_fails_each_of_its_images(tmp_path):
    red().save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "covers.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "1.png")
        archive.write(tmp_path / "a.png", "2.png")
    content = (tmp_path / "covers.zip").read_bytes()
    start = content.index(b"PK\x01\x02")
    reasons = set()
    for place in range(start, len(content)):
        damaged = tmp_path / f"{place}.zip"
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        for name in ("1.png", "2.png"):
            try:
                encode(damaged, 64, name)
            except DataError as error:
                reasons.add(error.got)
    assert {"a damaged zip file", "no such file", "a damaged member"} <= reasons
    assert not any("Error" in reason for reason in reasons)


def test_a_folder_in_an_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "covers.zip", "w") as archive:
        archive.writestr("1.png/", b"")
    with pytest.raises(DataError, match="got a folder"):
        encode(tmp_path / "covers.zip", 64, "1.png/")


def test_an_irregular_file_is_refused_without_blocking(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "nowhere.png").symlink_to("gone.png")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        monkeypatch.chdir(tmp_path)  # a socket's path has at most some hundred characters
        listener.bind("socket.png")
        for name, got in {
            "pipe.png": "a named pipe",
            "link.png": "a named pipe",
            "folder.png": "a folder",
            "socket.png": "a socket",
            "loop.png": "too many levels of symbolic links",
            "nowhere.png": "no such file",
        }.items():
            with pytest.raises(DataError, match=f"{name}: expected a valid image .*got {got}"):
                encode(tmp_path / name, 64)
    with pytest.raises(DataError, match="got a device"):
        encode(Path("/dev/zero"), 64)


def test_an_irregular_archive_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "covers.zip")
    with pytest.raises(DataError, match="got a named pipe"):
        encode(tmp_path / "covers.zip", 64, "1.png")


@pytest.mark.parametrize("way", ["link", "linked folder", "dots"])
def test_only_files_in_the_folder_are_read(tmp_path, way):
    (tmp_path / "raw").mkdir()
    (tmp_path / "other").mkdir()
    red().save(tmp_path / "other" / "a.png")
    (tmp_path / "raw" / "a.png").symlink_to("../other/a.png")
    (tmp_path / "raw" / "linked").symlink_to("../other")
    file = {
        "link": tmp_path / "raw" / "a.png",
        "linked folder": tmp_path / "raw" / "linked" / "a.png",
        "dots": tmp_path / "raw" / ".." / "other" / "a.png",
    }[way]
    with pytest.raises(DataError, match=r"got a path or link that leads out of .*raw; put"):
        encode(file, 64, folder=tmp_path / "raw")
    assert encode(file, 64, folder=tmp_path) == encode(tmp_path / "other" / "a.png", 64)


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("data:image/png;base64," + "iVBORw0KGgo/AAAA" * 4_000, "a data: URI"),
        ("data:,hello", "a data: URI"),
        ("a" * 256 + ".png", "a path longer than the system allows"),
        ("folder/" * 1_000 + "a.png", "no such file"),
        ("a\0.png", "no such file"),
    ],
)
def test_an_impossible_path_is_refused_and_shortened(tmp_path, name, got):
    with pytest.raises(DataError, match=f"got {got}") as error:
        encode(tmp_path / name, 64, folder=tmp_path)
    assert len(str(error.value)) < 600
    failures = Failures(1, 1.0)
    assert write_images([ImageLocation("1", tmp_path / name)], tmp_path / "out", 64, failures) == 0
    assert len(failures.rows[0]["place"]) <= 300


def test_the_error_of_a_bad_image_names_the_item(tmp_path):
    with pytest.raises(DataError, match=r"a\.png \(item i7\): expected a valid image"):
        write([ImageLocation("i7", tmp_path / "a.png")], tmp_path / "out.parquet")


@pytest.mark.parametrize("size", [(5_000, 1), (1, 5_000), (2_000, 4), (200, 1), (201, 1), (3, 900)])
def test_an_extreme_aspect_ratio_is_padded_with_white(tmp_path, size):
    red(size).save(tmp_path / "a.png")
    image, (width, height) = encode(tmp_path / "a.png", 672)
    assert max(width, height) == min(672, max(size))
    assert max(width, height) <= MAX_ASPECT * min(width, height)
    shown = np.asarray(decode(image)).reshape(-1, 3)
    assert (shown == RED).all(axis=1).any()


@given(st.integers(1, 3_000), st.integers(1, 3_000), st.integers(1, 700))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_stored_image_exceeds_the_maximum_aspect_ratio(tmp_path, width, height, side):
    Image.new("1", (width, height)).save(tmp_path / "a.png")
    _, size = encode(tmp_path / "a.png", side)
    assert min(size) >= 1
    assert max(size) <= min(side, max(width, height))
    assert max(size) <= MAX_ASPECT * min(size)


def test_avif_is_read(tmp_path):
    shown = recoded(red(), tmp_path / "a.jpg", format="AVIF", quality=95)
    assert near(shown.getpixel((5, 5)), RED, by=6)


def test_broken_exif_is_ignored(tmp_path):
    recoded(red(), tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    recoded(red(), tmp_path / "a.jpg", exif=b"Exif\0\0nothing of the kind")


def test_no_images_give_an_empty_table(tmp_path, capsys):
    assert write([], tmp_path / "out.parquet") == 0
    assert list(read_rows(Images, tmp_path / "out.parquet", "item")) == []
    assert capsys.readouterr().err == ""


def test_progress_with_a_total_goes_to_standard_error(tmp_path, capsys):
    red().save(tmp_path / "a.png")
    write([ImageLocation("a", tmp_path / "a.png")], tmp_path / "out.parquet")
    assert "1/1" in capsys.readouterr().err


def png(width: int, height: int, bits: int, lines: bytes) -> bytes:
    """Write an RGB PNG by hand, because Pillow cannot write all of them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )
