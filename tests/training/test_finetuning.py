"""Fine-tuning trains on the answer token, resumes after a kill, and selects the best epoch."""

import csv
import dataclasses
import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from transformers import TrainerControl, TrainerState, TrainingArguments

from mllm_msr.core.errors import DataError, ModelError, ParamsError
from mllm_msr.core.params import LoraParams, SftParams
from mllm_msr.engines.local import LocalModel, load_weights
from mllm_msr.images.gallery import Gallery
from mllm_msr.method.adapters import FusedLinear, load_adapter
from mllm_msr.method.examples import Example, Question
from mllm_msr.method.prompts import load_prompts, recommendation
from mllm_msr.method.scoring import ScoringModel
from mllm_msr.training.finetuning import (
    AnswerTrainer,
    FineTuning,
    Progress,
    TrainingReport,
    collate,
    last_checkpoint,
    measure_auc,
    sample_sequences,
)

TEMPLATES = load_prompts("recommender")
PARAMS = SftParams(
    lora=LoraParams(rank=4, alpha=8, dropout=0.1, layers=["q_proj", "v_proj", "down_proj"]),
    loss="yes_no",
    epochs=3,
    learning_rate=0.01,
    schedule="linear",
    warmup_share=0.1,
    batch_size=4,
    accumulation=2,
    max_gradient_norm=1.0,
    select_by="auc",
    validation_sequences=9,
    seed=5,
)


def example(sequence: int, item: str, label: bool, gallery: Gallery) -> Example:
    """Return an example whose title determines the answer: yes for red, no for blue."""
    title = f"{'red red red' if label else 'blue'} {sequence}"
    image_ref = gallery.image_ref(item)
    prompt = recommendation(TEMPLATES, "Likes red.", title, image_ref, None)
    return Example(Question(sequence, item, label), prompt)


@pytest.fixture(scope="session")
def train(gallery: Gallery) -> list[Example]:
    # Every second pair has no image, so batches are mixed.
    return [example(s, "ad"[s % 2], label, gallery) for s in range(10) for label in (False, True)]


@pytest.fixture(scope="session")
def valid(gallery: Gallery) -> list[Example]:
    labels = (False, True, False)
    return [
        example(s, i, y, gallery) for s in (20, 21, 22) for i, y in zip("ada", labels, strict=True)
    ]


def tuning(llava: LocalModel, out: Path, **changes: object) -> FineTuning:
    tokens = [
        llava.encoder.answer_token_id(recommendation(TEMPLATES, "", "", None, None), answer)
        for answer in ("yes", "no")
    ]
    params = PARAMS.model_copy(update=changes)
    return FineTuning(llava, (tokens[0], tokens[1]), params, out / "work", out)


def open_trainer(
    job: FineTuning, adapted: PeftModel, train: list[Example], valid: list[Example]
) -> AnswerTrainer:
    return job._trainer(adapted, train, valid, job.schedule(train, valid))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def curve(out: Path, name: str) -> list[tuple[int, float]]:
    path = out / "curves" / "plots" / "metrics" / f"{name}.tsv"
    with path.open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [(int(row["step"]), float(row[name.rpartition("/")[2]])) for row in rows]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A complete training, shared by several tests."""

    out: Path
    report: TrainingReport


@pytest.fixture(scope="session")
def finished(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    out = tmp_path_factory.mktemp("finished")
    job = tuning(llava, out)
    report = job.run(train, valid)
    job.finish()
    return Finished(out, report)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("way", ["packed", "whole prompts", "pixels"])
def test_the_loss_is_the_cross_entropy_of_the_answer_alone(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    finished: Finished,
    tmp_path: Path,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mllm_msr.engines.packing.supports_packing", lambda _: way == "packed")
    if way == "pixels":
        monkeypatch.setattr("mllm_msr.training.finetuning.make_packer", lambda *_: None)
    adapted = load_adapter(load_weights(llava.encoder, torch.float32), finished.out / "adapter")
    trainer = open_trainer(tuning(llava, tmp_path), adapted, train, valid)
    batch = trainer.data_collator(train[:4])
    said = llava.encoder.tokenizer.batch_decode(batch["answer_token_ids"][:, None])
    assert [word.strip() for word in said] == ["no", "yes", "no", "yes"]
    encoded = llava.encoder.encode([example.prompt for example in train[:4]])
    with torch.inference_mode():
        trainer.model.eval()
        found = trainer.compute_loss(trainer.model, batch)
        if trainer.packer:  # four pairs, two of them with the one image
            trainer.compute_loss(trainer.model, trainer.data_collator(train[:4]))
            assert trainer.packer.image_features.computed == 1
        logits = trainer.model(**encoded).logits[:, -1]
    expected = -logits.log_softmax(-1)[range(4), batch["answer_token_ids"]].mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert "answer_token_ids" in batch


def test_only_the_adapter_has_gradients(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    finished: Finished,
    tmp_path: Path,
) -> None:
    adapted = load_adapter(load_weights(llava.encoder, torch.float32), finished.out / "adapter")
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)  # as it was in training
    trainer = open_trainer(tuning(llava, tmp_path), adapted, train, valid)
    trainer.compute_loss(adapted, trainer.data_collator(train[:4])).backward()
    touched = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert touched
    assert all("lora_" in name and "language_model" in name for name in touched)
    assert all(p.grad.abs().max() > 0 for _, p in adapted.named_parameters() if p.grad is not None)


def test_an_easy_task_is_learnt(
    llava: LocalModel, train: list[Example], valid: list[Example], tmp_path: Path
) -> None:
    report = tuning(llava, tmp_path, epochs=6, accumulation=1).run(train, valid)
    for name in ("train/loss", "valid/loss"):
        losses = [loss for _, loss in curve(tmp_path, name)]
        assert losses[-1] < losses[0] / 4
    assert report.valid_auc == 1.0


def test_bfloat16_inputs_of_an_adapter_are_not_cast(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llava, "dtype", torch.bfloat16)
    lora = PARAMS.lora.model_copy(update={"dropout": 0.0})
    casts: list[bool] = []
    cast = BaseTunerLayer._cast_input_dtype

    def record(layer: BaseTunerLayer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        found = cast(layer, x, dtype)
        casts.append(found.dtype != x.dtype)
        return found

    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", record)
    tuning(llava, tmp_path / "fused", epochs=1, lora=lora).run(train, valid)
    assert not any(casts)
    monkeypatch.setattr(FusedLinear, "forward", Linear.forward)  # PEFT's casts
    tuning(llava, tmp_path / "plain", epochs=1, lora=lora).run(train, valid)
    assert any(casts)


def test_an_easy_task_is_learnt_on_four_bits_too(
    llava: LocalModel, train: list[Example], valid: list[Example], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    small = LocalModel(llava.encoder, four_bit=True)
    report = tuning(small, tmp_path, epochs=6, accumulation=1).run(train, valid)
    assert report.valid_auc == 1.0
    load_adapter(small.load(), tmp_path / "adapter")  # every key fits, or it raises


def test_curves_have_each_point_once_and_one_before_training(finished: Finished) -> None:
    # 20 pairs of 4 x 2 a step are 3 steps an epoch.
    assert finished.report.steps == 9
    for name in ("valid/loss", "valid/auc"):
        assert [step for step, _ in curve(finished.out, name)] == [0, 3, 6, 9]
    assert [step for step, _ in curve(finished.out, "train/loss")] == list(range(1, 10))


def test_the_report_is_of_the_first_best_epoch(finished: Finished) -> None:
    areas = [value for _, value in curve(finished.out, "valid/auc")][1:]
    losses = [value for _, value in curve(finished.out, "valid/loss")][1:]
    best = int(np.argmax(areas))
    assert finished.report == TrainingReport(9, best + 1, areas[best], losses[best])


@pytest.mark.parametrize("select_by", ["auc", "loss"])
def test_the_adapter_is_that_of_the_selected_epoch(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    tmp_path: Path,
    select_by: str,
) -> None:
    # A learning rate so high that the last epoch is not the best.
    job = tuning(
        llava, tmp_path, select_by=select_by, learning_rate=0.3, schedule="constant_with_warmup"
    )
    report = job.run(train, valid)
    recommender = ScoringModel(llava, tmp_path / "adapter", job.answer_token_ids, trained=True)
    responses = recommender.score_batch([example.prompt for example in valid])
    scores = np.array([float(response.text) for response in responses])
    sequences = np.array([example.question.sequence for example in valid])
    labels = np.array([example.question.label for example in valid])
    areas = [roc_auc_score(labels[sequences == s], scores[sequences == s]) for s in (20, 21, 22)]
    assert report.valid_auc == pytest.approx(np.mean(areas))
    name, best = ("valid/auc", max) if select_by == "auc" else ("valid/loss", min)
    kept = report.valid_auc if select_by == "auc" else report.valid_loss
    assert kept == best(value for step, value in curve(tmp_path, name) if step)


def test_the_adapter_is_in_pefts_format_and_checkpoints_are_gone(finished: Finished) -> None:
    names = {path.name for path in (finished.out / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert sorted(path.name for path in finished.out.iterdir()) == ["adapter", "curves"]


@pytest.mark.slow
def test_the_adapter_depends_on_the_seed_alone(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    finished: Finished,
    tmp_path: Path,
) -> None:
    torch.manual_seed(99)  # earlier random numbers do not matter
    tuning(llava, tmp_path / "same").run(train, valid)
    assert same(weights(tmp_path / "same"), weights(finished.out))
    tuning(llava, tmp_path / "other", seed=6).run(train, valid)
    assert not same(weights(tmp_path / "other"), weights(finished.out))


def test_metrics_are_in_the_progress_bar_and_not_in_lines_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress, state, control = Progress(), TrainerState(max_steps=3), TrainerControl()
    arguments = TrainingArguments(use_cpu=True)
    progress.on_train_begin(arguments, state, control)
    progress.on_log(arguments, state, control, logs={"loss": 0.5, "grad_norm": 1.0})
    progress.on_log(arguments, state, control, logs={"eval_auc": 0.75})
    assert progress.training_bar.postfix == "loss=0.5, eval_auc=0.75"
    said = capsys.readouterr()
    assert "{" not in said.out + said.err


def test_zero_epochs_leave_the_scores_unchanged(
    llava: LocalModel, train: list[Example], valid: list[Example], tmp_path: Path
) -> None:
    job = tuning(llava, tmp_path, epochs=0)
    assert job.run(train, valid) == TrainingReport(0, 0, None, None)
    recommender = ScoringModel(llava, tmp_path / "adapter", job.answer_token_ids, trained=False)
    prompts = [example.prompt for example in valid]
    scores = [float(response.text) for response in recommender.score_batch(prompts)]
    with torch.inference_mode():
        logits = llava.weights(**llava.encoder.encode(prompts)).logits[:, -1]
    yes, no = job.answer_token_ids
    assert scores == pytest.approx((logits[:, yes] - logits[:, no]).tolist(), abs=1e-4)
    assert curve(tmp_path, "valid/auc") == []


@pytest.mark.slow
@pytest.mark.parametrize("litter", [None, "empty", "half"])
def test_a_killed_training_resumes_to_the_same_adapter(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    finished: Finished,
    tmp_path: Path,
    litter: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tuning(llava, tmp_path)
    batches = 0

    def collate_or_die(*arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        # Validation has one batch (before the first epoch and after each), an epoch has 5.
        if batches == 1 + 5 + 1 + 3:
            raise KeyboardInterrupt
        return collate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("mllm_msr.training.finetuning.collate", collate_or_die)
        with pytest.raises(KeyboardInterrupt):
            whole.run(train, valid)
    assert not (tmp_path / "adapter").exists()
    first = tmp_path / "work" / "checkpoint-3"
    assert last_checkpoint(tmp_path / "work") == str(first)
    if litter:  # a second kill, while the next checkpoint was being written
        (tmp_path / "work" / "checkpoint-6").mkdir()
        half = (first / "trainer_state.json").read_text(encoding="utf-8")[:40]
        if litter == "half":
            (tmp_path / "work" / "checkpoint-6" / "trainer_state.json").write_text(half)
        assert last_checkpoint(tmp_path / "work") == str(first)
    report = whole.run(train, valid)
    assert report == finished.report
    assert same(weights(tmp_path), weights(finished.out))
    for name in ("train/loss", "valid/loss", "valid/auc"):
        assert curve(tmp_path, name) == curve(finished.out, name)
    whole.finish()
    assert not (tmp_path / "work").exists()


# One validation batch runs before the first epoch and after each, an epoch has five batches.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("forward", "checkpoint"),
    [
        (1 + 4, 1),  # within the first epoch: a step has two batches
        (1 + 5 + 1, 3),  # in the validation after it
        (1 + 5 + 1 + 4, 4),  # within the second epoch
        (1 + 5 + 1 + 5 + 1 + 5 + 1, 9),  # in the last validation
    ],
)
def test_a_training_killed_anywhere_resumes_to_the_same_adapter(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    finished: Finished,
    tmp_path: Path,
    forward: int,
    checkpoint: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mllm_msr.training.finetuning.CHECKPOINT_SECONDS", 0)
    job = tuning(llava, tmp_path)
    run, forwards = AnswerTrainer._run, 0

    def run_or_die(trainer: AnswerTrainer, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        nonlocal forwards
        forwards += 1
        if forwards == forward:
            raise KeyboardInterrupt
        return run(trainer, model, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "_run", run_or_die)
        with pytest.raises(KeyboardInterrupt):
            job.run(train, valid)
    assert last_checkpoint(tmp_path / "work") == str(tmp_path / f"work/checkpoint-{checkpoint}")
    assert job.run(train, valid) == finished.report
    assert same(weights(tmp_path), weights(finished.out))
    for name in ("train/loss", "valid/loss", "valid/auc"):
        assert curve(tmp_path, name) == curve(finished.out, name)


def test_checkpoints_within_an_epoch_are_made_by_time(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[int] = []
    save = AnswerTrainer._save

    def record(trainer: AnswerTrainer, *arguments: Any, **options: Any) -> None:
        saved.append(trainer.state.global_step)
        save(trainer, *arguments, **options)

    monkeypatch.setattr(AnswerTrainer, "_save", record)
    for seconds, steps in ((0, [1, 2, 3, 4, 5, 6]), (10_000, [3, 6])):
        saved.clear()
        monkeypatch.setattr("mllm_msr.training.finetuning.CHECKPOINT_SECONDS", seconds)
        tuning(llava, tmp_path / str(seconds), epochs=2).run(train, valid)
        assert saved == steps  # each once, though a validation comes after steps 3 and 6


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError], ids=["CUDA", "CPU"])
def test_a_training_out_of_memory_resumes_with_smaller_batches(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    tmp_path: Path,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = 0

    def run_out(trainer: AnswerTrainer, *arguments: Any, **options: Any) -> Any:
        nonlocal losses
        losses += 1
        if losses == 5 + 2:  # in the second epoch of 5 batches
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return lose(trainer, *arguments, **options)

    lose = AnswerTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "compute_loss", run_out)
        with pytest.raises(ModelError, match="sft: expected memory for a batch of 4") as raised:
            tuning(llava, tmp_path).run(train, valid)
    assert "set sft.batch_size to 2 and sft.accumulation to 4; run again" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert last_checkpoint(tmp_path / "work") == str(tmp_path / "work" / "checkpoint-3")
    smaller = tuning(llava, tmp_path, batch_size=2, accumulation=4)
    assert smaller.run(train, valid).steps == 9
    assert [step for step, _ in curve(tmp_path, "train/loss")] == list(range(1, 10))
    assert [step for step, _ in curve(tmp_path, "valid/auc")] == [0, 3, 6, 9]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "digests.json"])
def test_a_damaged_checkpoint_counts_as_missing(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    finished: Finished,
    tmp_path: Path,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = tuning(llava, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "_determine_best_metric", interrupt)
        with pytest.raises(KeyboardInterrupt):
            job.run(train, valid)
    assert last_checkpoint(tmp_path / "work") == str(tmp_path / "work" / "checkpoint-3")
    path = tmp_path / "work" / "checkpoint-3" / file
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert last_checkpoint(tmp_path / "work") is None
    assert "checkpoint-3 is damaged and counts as missing" in caplog.text
    assert job.run(train, valid) == finished.report
    assert same(weights(tmp_path), weights(finished.out))


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_is_one_line_and_loses_no_checkpoint(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = 0

    def save(trainer: AnswerTrainer, folder: str) -> None:
        nonlocal saved
        saved += 1
        if saved == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_state(trainer, folder)

    save_state = AnswerTrainer._save_optimizer_and_scheduler
    monkeypatch.setattr(AnswerTrainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(DataError, match="expected room for a checkpoint; got a full disk"):
        tuning(llava, tmp_path).run(train, valid)
    assert last_checkpoint(tmp_path / "work") == str(tmp_path / "work" / "checkpoint-3")


def test_a_failure_after_the_last_epoch_repeats_none(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = tuning(llava, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("mllm_msr.training.finetuning._save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            job.run(train, valid)
    monkeypatch.setattr("mllm_msr.training.finetuning.collate", interrupt)  # no batch is needed
    assert job.run(train, valid) == finished.report
    assert same(weights(tmp_path), weights(finished.out))


def test_a_single_pair_is_not_halved_for_lack_of_memory(llava: LocalModel, tmp_path: Path) -> None:
    fix = tuning(llava, tmp_path, batch_size=1)._smaller()
    assert "recommender.four_bit" in fix
    assert "batch_size" not in fix


ties = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=3, max_size=3)


@given(st.lists(ties, min_size=1, max_size=5))
def test_the_auc_is_scikit_learns_of_each_sequence_averaged(scores: list[list[float]]) -> None:
    labels = [False, True, False]
    questions = [Question(n * 7, "a", label) for n in range(len(scores)) for label in labels]
    found = measure_auc(questions, np.ravel(scores))
    by_hand = [
        np.mean([(yes > no) + 0.5 * (yes == no) for no in (first, last)])
        for first, yes, last in scores
    ]
    assert found == pytest.approx(np.mean(by_hand))
    assert found == pytest.approx(np.mean([roc_auc_score(labels, row) for row in scores]))


@pytest.mark.parametrize("way", ["packed", "whole prompts", "pixels"])
def test_validation_gives_loss_and_auc_of_the_pairs_one_by_one(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    gallery: Gallery,
    finished: Finished,
    tmp_path: Path,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mllm_msr.engines.packing.supports_packing", lambda _: way == "packed")
    if way == "pixels":
        monkeypatch.setattr("mllm_msr.training.finetuning.make_packer", lambda *_: None)
    adapted = load_adapter(load_weights(llava.encoder, torch.float32), finished.out / "adapter")
    job = tuning(llava, tmp_path)
    # The same item for several users, and others of one user: rows share images and preferences.
    pairs = [*valid, *(example(30, "abcd"[n % 4], n % 2 == 0, gallery) for n in range(8))]
    questions = [Question(n // 2, *pair.question[1:]) for n, pair in enumerate(pairs[9:])]
    pairs[9:] = [Example(q, pair.prompt) for q, pair in zip(questions, pairs[9:], strict=True)]
    trainer = open_trainer(job, adapted, train, pairs)
    metrics = trainer.evaluate()
    yes, no = job.answer_token_ids
    with torch.inference_mode():
        logits = torch.cat(
            [adapted(**llava.encoder.encode([pair.prompt])).logits[:, -1] for pair in pairs]
        )
    labels = torch.tensor([yes if pair.question.label else no for pair in pairs])
    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    log_odds = (logits[:, yes] - logits[:, no]).numpy()
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert metrics["eval_auc"] == measure_auc([pair.question for pair in pairs], log_odds)


def test_a_sample_keeps_whole_sequences_and_their_order() -> None:
    questions = [Question(s, i, i == "b") for s in (5, 1, 9, 3) for i in "ab"]
    chosen = sample_sequences(questions, 2, seed=1)
    assert len(chosen) == 4
    assert chosen == [q for q in questions if q.sequence in {c.sequence for c in chosen}]
    assert sample_sequences(questions, 2, seed=1) == chosen
    assert any(sample_sequences(questions, 2, seed=n) != chosen for n in range(2, 6))
    assert sample_sequences(questions, 4, seed=1) == questions


@pytest.mark.slow
def test_a_listwise_training_learns_an_easy_task_too(
    llava: LocalModel, train: list[Example], valid: list[Example], tmp_path: Path
) -> None:
    report = tuning(llava, tmp_path, loss="listwise", epochs=6, accumulation=1).run(train, valid)
    assert report.valid_auc == 1.0
    first, *_, last = [value for _, value in curve(tmp_path, "train/loss")]
    assert last < first


def test_a_listwise_batch_has_whole_sequences(
    llava: LocalModel, train: list[Example], tmp_path: Path
) -> None:
    order = list(tuning(llava, tmp_path, loss="listwise")._order(train, 4))
    for start in range(0, len(order), PARAMS.batch_size):
        asked = [train[n].question.sequence for n in order[start : start + PARAMS.batch_size]]
        assert all(asked.count(sequence) == 2 for sequence in asked)
    with pytest.raises(ParamsError, match=r"a multiple of the 2 candidates .*; got 3; choose one"):
        tuning(llava, tmp_path, loss="listwise", batch_size=3)._order(train, 3)


def test_a_training_puts_as_many_pairs_to_the_model_as_a_dry_run_counts(
    llava: LocalModel,
    train: list[Example],
    valid: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = 0
    run = AnswerTrainer._run

    def count(trainer: AnswerTrainer, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        nonlocal pairs
        pairs += len(inputs["answer_token_ids"])
        return run(trainer, model, inputs)

    monkeypatch.setattr(AnswerTrainer, "_run", count)
    for epochs in (0, 2):
        pairs = 0
        job = tuning(llava, tmp_path / str(epochs), epochs=epochs)
        job.run(train, valid)
        assert pairs == sum(len(one.examples) for one in job.schedule(train, valid))
