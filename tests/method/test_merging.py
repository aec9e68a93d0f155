"""A merged model answers as base model and adapter do, in this process and behind a server."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from small_adapter import save_adapter
from small_world import SmallWorld, recommender_settings
from tqdm import tqdm

from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel, load_weights
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import ResponseStore
from mllm_msr.images.gallery import Gallery
from mllm_msr.method.adapters import load_adapter
from mllm_msr.method.examples import RecommenderInputs, open_recommender, read_questions
from mllm_msr.method.inference import greedy_engine
from mllm_msr.method.inference.server import ServerModel
from mllm_msr.method.merging import write_merged_model
from mllm_msr.method.prompts import load_prompts
from mllm_msr.method.scoring import ScoringModel, score_examples, scoring_engine


@contextmanager
def transformers_serve(folder: Path, log: Path) -> Iterator[str]:
    """Serve a model folder by ``transformers serve`` on loopback; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen([*command, *options], stdout=output, stderr=output, env=environment) as it,
    ):
        try:
            deadline = time.monotonic() + 180
            while time.monotonic() < deadline:
                assert it.poll() is None, log.read_text()
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            it.terminate()


def test_the_weights_are_those_of_base_and_adapter(
    recommender: RecommenderInputs, tmp_path: Path
) -> None:
    encoder = recommender.model.encoder
    adapter = save_adapter(encoder, tmp_path / "adapter", strength=0.3)
    write_merged_model(encoder, adapter, ("yes", "no"), tmp_path / "merged")
    merged = Encoder(str(tmp_path / "merged"), None, None)
    inputs = merged.encode([Prompt("Describe the red kettle.")])
    adapted = load_adapter(load_weights(encoder, torch.float32), adapter).eval()
    with torch.inference_mode():
        ours = load_weights(merged, torch.float32).eval()(**inputs).logits
        assert torch.allclose(ours, adapted(**inputs).logits, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(ours, adapted(**inputs).logits, atol=1e-2)


@pytest.mark.slow
def test_transformers_serve_gives_the_same_texts_and_log_odds(
    llava: LocalModel,
    gallery: Gallery,
    world: SmallWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = save_adapter(llava.encoder, tmp_path / "adapter", strength=0.3)
    merged = tmp_path / "merged"
    write_merged_model(llava.encoder, adapter, ("yes", "no"), merged)
    local = LocalModel(Encoder(str(merged), None, gallery))
    prompts = [
        *(Prompt("Describe", image_ref, "briefly.") for image_ref in gallery.image_refs),
        *(Prompt(f"Summary of item {number}:") for number in range(6)),
    ]
    settings = recommender_settings(Path(llava.encoder.name), image=True)
    tables = (world.preferences, world.items, world.images)
    with (
        transformers_serve(merged, tmp_path / "log") as address,
        ResponseStore(tmp_path / "responses.sqlite") as store,
        open_recommender(settings, load_prompts("recommender"), *tables) as inputs,
        tqdm(disable=True) as bar,
    ):
        monkeypatch.setenv("MLLM_MSR_SERVER", address)
        server = ServerModel(local.encoder, "summarize_items")
        texts = [greedy_engine(m, store, 8).respond(prompts, bar) for m in (local, server)]
        assert texts[0] == texts[1]
        assert len(set(texts[0])) > 1
        model = ScoringModel(inputs.model, adapter, inputs.answer_token_ids, trained=True)
        limit = inputs.builder.limit
        engines = [scoring_engine(model, store, limit, name) for name in ("local", "server")]
        questions = [q for s in ("valid", "test") for q in read_questions(world.candidates(s))]
        examples = {"test": [inputs.builder.build(question) for question in questions]}
        here, there = (score_examples(examples, engine) for engine in engines)
        assert len({row.log_odds for row in here}) > 1
        assert [row.log_odds for row in there] == pytest.approx(
            [row.log_odds for row in here], abs=1e-3
        )
        assert engines[1].computed == len(here)
