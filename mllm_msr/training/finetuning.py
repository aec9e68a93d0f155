"""Supervised fine-tuning of the recommender (paper, section Method, step 3).

A forward over the prompt gives the logits of the token that the answer begins with; the loss looks
at these and nothing else. (The paper's token-level likelihood over the whole prompt spends nearly
all of its signal on text that is given.)

The vision tower sees an image once for the whole training, as far as features fit into memory, and
pairs of one image in a batch run packed, each where the model's family allows it
(:mod:`mllm_msr.engines.packing`); the loss is that of the pairs one by one.
"""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import DistributedType, PartialState
from dvclive import Live
from peft import PeftModel
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    EvalPrediction,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from mllm_msr.core.devices import explain_out_of_memory
from mllm_msr.core.errors import ModelError, ParamsError
from mllm_msr.core.files import atomic_write
from mllm_msr.core.params import SftParams
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.packing import Packer, find_packer
from mllm_msr.method.adapters import add_adapter
from mllm_msr.method.examples import Example, Question
from mllm_msr.training.files import CURVES, write_empty_curves
from mllm_msr.training.losses import listwise_loss, yes_no_loss
from mllm_msr.training.sampling import GroupSampler

LOGGED_STEPS = 50  # points of the training curve, about
PAIRS_OF_AN_IMAGE = 4  # in a batch, at most; more would make it one of too few different items
PAIRS_VALIDATED = 16  # at once


@dataclass(frozen=True)
class TrainingReport:
    """How a fine-tuning went.

    Attributes:
        steps: Optimizer steps taken; 0 leaves the model as it was.
        epoch: The epoch that was kept; 0 if none was trained.
        valid_auc: Its AUC on the validation sequences, averaged over sequences; None if untrained.
        valid_loss: Its loss there; None if untrained.
    """

    steps: int
    epoch: int
    valid_auc: float | None
    valid_loss: float | None


class AnswerTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the loss on the answer alone."""

    def __init__(
        self,
        answers: tuple[int, int],
        packer: Packer | None,
        order: Sampler[int],
        listwise: bool,
        **options: Any,
    ) -> None:
        """Take what a training needs.

        Args:
            answers: The token ids of yes and no.
            packer: Runs batches; None for families that look at the pixels of each prompt.
            order: Of the training examples.
            listwise: Whether to learn from whole sequences; validation is always pair by pair.
            options: What Trainer takes.
        """
        super().__init__(**options)
        self.answers, self.packer, self.order = answers, packer, order
        self.listwise = listwise
        self.model_accepts_loss_kwargs = False  # the loss below is a mean over its own batch

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        del train_dataset
        return self.order

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: Trainer's estimate holds for whole prompts only."""
        del inputs
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Give the loss of a batch; :mod:`mllm_msr.training.losses` has both."""
        del num_items_in_batch
        logits, answers = self._run(model, inputs), inputs["answers"]
        if self.listwise:
            yes, no = self.answers
            log_odds = logits[:, yes] - logits[:, no]
            loss = listwise_loss(log_odds, answers == yes, inputs["sequences"])
        else:
            loss = yes_no_loss(logits, answers)
        return (loss, logits) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give loss, log-odds of yes against no (batch,), and whether yes is right (batch,)."""
        del prediction_loss_only, ignore_keys
        inputs = self._prepare_inputs(inputs)
        yes, no = self.answers
        with torch.no_grad():
            logits = self._run(model, inputs)
        loss = yes_no_loss(logits, inputs["answers"])
        return loss, logits[:, yes] - logits[:, no], inputs["answers"] == yes

    def _run(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Give the logits after each prompt, (batch, vocabulary), in float32."""
        if self.packer:
            return self.packer.run(model, inputs["packed"]).float()
        plain = {name: inputs[name] for name in inputs.keys() - {"answers", "sequences"}}
        return cast(torch.Tensor, model(**plain, logits_to_keep=1).logits[:, -1].float())


class Curves(TrainerCallback):  # type: ignore[misc]
    """Writes the training curves by DVCLive, in the main process.

    They are written anew from Trainer's own history at each log, so that a resumed run has each
    point once.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder that DVCLive writes to."""
        self._folder = folder

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write all points so far."""
        del args, control
        if state.is_world_process_zero:
            write_curves(state.log_history, self._folder)


class Progress(ProgressCallback):  # type: ignore[misc]
    """Shows the last measures at the end of the progress bar, not as lines that break it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin without measures."""
        super().on_train_begin(args, state, control)
        self._shown: dict[str, float] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Put the new measures beside those that are shown already."""
        del args, control
        if state.is_world_process_zero and self.training_bar is not None:
            self._shown |= {key: logs[key] for key in CURVES if logs and key in logs}
            self.training_bar.set_postfix(self._shown)


@dataclass(frozen=True)
class FineTuning:
    """All that a fine-tuning needs besides its examples.

    Attributes:
        model: The base model.
        answers: The token ids of yes and no.
        params: The section ``sft``.
        work: Folder of checkpoints; where it has some, training goes on from the last.
        out: Folder of the results.
    """

    model: LocalModel
    answers: tuple[int, int]
    params: SftParams
    work: Path
    out: Path

    def run(self, train: Sequence[Example], valid: Sequence[Example]) -> TrainingReport:
        """Train an adapter, write it with its curves, and report.

        Args:
            train: Examples to learn from.
            valid: Examples of whole validation sequences, sequence by sequence.

        Raises:
            ModelError: The training diverged, memory ran out, or the dtype is float16, which would
                need its loss scaled.
        """
        if self.model.dtype == torch.float16:
            fix = "set bfloat16 or float32"
            raise ModelError(
                expected="a dtype to train in", got="float16", where="MLLM_MSR_DTYPE", fix=fix
            )
        set_seed(self.params.seed)
        lora = self.params.lora
        bare = self.model.load()
        adapted = add_adapter(bare, lora.rank, lora.alpha, lora.dropout, lora.layers)
        if self.params.epochs and torch.cuda.device_count() > 1 and not is_distributed():
            fix = "accelerate launch --num_processes N, or show one in CUDA_VISIBLE_DEVICES"
            got = f"one for {torch.cuda.device_count()} GPUs"
            raise ModelError(expected="a process for each GPU", got=got, where="sft", fix=fix)
        if self.params.epochs == 0:
            if PartialState().is_main_process:
                write_curves([], self.out / "curves")
                _save(adapted, self.out / "adapter")
            return TrainingReport(0, 0, None, None)
        valid = order_by_image(valid)
        trainer = self._trainer(adapted, train, valid)
        checkpoint = last_checkpoint(self.work)
        trainer.args.eval_on_start = checkpoint is None  # a resumed run has this point already
        with explain_out_of_memory(
            f"a batch of {self.params.batch_size} pairs", "sft", self._smaller()
        ):
            trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_world_process_zero():
            _save(adapted, self.out / "adapter")
            write_curves(trainer.state.log_history, self.out / "curves")
        trainer.accelerator.wait_for_everyone()  # the best checkpoint may still be read
        return read_report(trainer.state, self.params.select_by)

    def finish(self) -> None:
        """Remove the checkpoints; to be called when all results are written."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _trainer(
        self, adapted: PeftModel, train: Sequence[Example], valid: Sequence[Example]
    ) -> AnswerTrainer:
        self.work.mkdir(parents=True, exist_ok=True)
        sequences = np.array([example.question.sequence for example in valid])
        encoder = self.model.encoder
        packer = find_packer(encoder, adapted.get_base_model(), self.model.budget)
        trainer = AnswerTrainer(
            answers=self.answers,
            packer=packer,
            order=self._order(train),
            listwise=self.params.loss == "listwise",
            model=adapted,
            args=self._arguments(len(train)),
            data_collator=partial(collate, encoder, packer, self.answers),
            train_dataset=train,
            eval_dataset=valid,
            compute_metrics=partial(measure_auc, sequences=sequences),
            callbacks=[Curves(self.out / "curves"), Progress],
        )
        trainer.remove_callback(ProgressCallback)
        return trainer

    def _order(self, train: Sequence[Example]) -> GroupSampler:
        """Bring pairs of one image together, or where the loss is listwise, of one sequence.

        Raises:
            ParamsError: A batch would cut sequences in two.
        """
        size, seed = self.params.batch_size, self.params.seed
        lengths = [self.model.encoder.count(example.prompt) for example in train]
        if self.params.loss == "yes_no":
            images = [example.prompt.image for example in train]
            return GroupSampler(images, lengths, PAIRS_OF_AN_IMAGE, size, seed)
        sequences = [example.question.sequence for example in train]
        candidates = max(Counter(sequences).values(), default=1)
        if size % candidates:
            fix = "choose one, or set sft.loss to yes_no"
            raise ParamsError(
                expected=f"a multiple of the {candidates} candidates of a training sequence",
                got=str(size),
                where="sft.batch_size",
                fix=fix,
            )
        return GroupSampler(sequences, lengths, candidates, size, seed)

    def _smaller(self) -> str:
        """Say what to do where memory is too little; a step stays one of as many pairs."""
        size, accumulation = self.params.batch_size, self.params.accumulation
        if size == 1:
            return "use recommender.four_bit, smaller images, shorter prompts or a smaller model"
        half = size // 2
        more = f"{2 * accumulation}" if size % 2 == 0 else f"more than {accumulation}"
        return (
            f"set sft.batch_size to {half} and sft.accumulation to {more}; run again, "
            "it goes on from the last finished epoch if a step has as many pairs as before"
        )

    def _arguments(self, pairs: int) -> TrainingArguments:
        params = self.params
        steps = params.epochs * pairs / (params.batch_size * params.accumulation)
        return TrainingArguments(
            output_dir=str(self.work),
            num_train_epochs=params.epochs,
            learning_rate=params.learning_rate,
            lr_scheduler_type=params.schedule,
            warmup_steps=params.warmup_share,  # below 1: a share of all steps
            per_device_train_batch_size=params.batch_size,
            per_device_eval_batch_size=PAIRS_VALIDATED,
            gradient_accumulation_steps=params.accumulation,
            max_grad_norm=params.max_gradient_norm,
            seed=params.seed,
            bf16=self.model.dtype == torch.bfloat16,
            use_cpu=self.model.device.type == "cpu",
            gradient_checkpointing=self.model.device.type == "cuda",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model=params.select_by,
            greater_is_better=params.select_by == "auc",
            logging_steps=max(1, int(steps / LOGGED_STEPS)),
            remove_unused_columns=False,
            dataloader_pin_memory=self.model.device.type == "cuda",
            report_to="none",
        )


def is_distributed() -> bool:
    """Tell whether this process is one of several, or could be: it was started by a launcher."""
    return bool(PartialState().distributed_type != DistributedType.NO)


def collate(
    encoder: Encoder,
    packer: Packer | None,
    answers: tuple[int, int],
    examples: Sequence[Example],
) -> dict[str, Any]:
    """Encode a batch, after its right answers' tokens and its sequences, of shape (batch,) each.

    Trainer takes the first entry for the size of the batch.
    """
    yes, no = answers
    right = torch.tensor([yes if example.question.label else no for example in examples])
    prompts = [example.prompt for example in examples]
    inputs = {"packed": packer.pack(prompts)} if packer else encoder.encode(prompts)
    sequences = torch.tensor([example.question.sequence for example in examples])
    return {"answers": right, "sequences": sequences} | inputs


def order_by_image(examples: Sequence[Example]) -> list[Example]:
    """Put pairs of one image together, images with as many pairs side by side: little is padded."""
    images = [example.prompt.image for example in examples]
    pairs = Counter(images)
    keys = [(pairs[image], image.digest if image else "") for image in images]
    return [examples[number] for number in sorted(range(len(keys)), key=keys.__getitem__)]


def last_checkpoint(work: Path) -> str | None:
    """Find the last whole checkpoint: of its files Trainer writes the state last."""
    whole = {}
    for state in work.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):  # half a file, where the kill fell into its writing
            whole[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = state.parent
    return str(whole[max(whole)]) if whole else None


def measure_auc(prediction: EvalPrediction, sequences: "np.ndarray[Any, Any]") -> dict[str, float]:
    """Average the AUC over validation sequences, with ties in the middle (scikit-learn's).

    Args:
        prediction: Log-odds and labels, shape (pairs,) each.
        sequences: The sequence of each pair, shape (pairs,).

    Raises:
        ModelError: Scores are not finite.
    """
    scores, labels = prediction.predictions, prediction.label_ids
    if not np.isfinite(scores).all():
        fix = "lower sft.learning_rate or sft.max_gradient_norm"
        raise ModelError(
            expected="finite scores", got="a training that diverged", where="sft", fix=fix
        )
    areas = [
        roc_auc_score(labels[sequences == sequence], scores[sequences == sequence])
        for sequence in np.unique(sequences)
    ]
    return {"auc": float(np.mean(areas))}


def write_curves(history: Sequence[Mapping[str, float]], folder: Path) -> None:
    """Write the curves of a training's history: one file per measure, a row per step."""
    if not history:
        write_empty_curves(folder)
        return
    with Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None) as live:
        for entry in history:
            live.step = int(entry["step"])
            for key in [key for key in CURVES if key in entry]:  # in one order, run after run
                live.log_metric(CURVES[key], entry[key])


def sample_sequences(questions: Sequence[Question], sequences: int, seed: int) -> list[Question]:
    """Keep the questions of at most so many sequences, a seeded sample, in their order."""
    every = sorted({question.sequence for question in questions})
    if len(every) <= sequences:
        return list(questions)
    chosen = set(np.random.default_rng(seed).choice(every, sequences, replace=False).tolist())
    return [question for question in questions if question.sequence in chosen]


def _save(adapted: PeftModel, folder: Path) -> None:
    with atomic_write(folder) as temporary:
        adapted.save_pretrained(str(temporary), save_embedding_layers=False)


def read_report(state: TrainerState, select_by: str) -> TrainingReport:
    """Read the kept epoch and its measures from Trainer's history."""
    kept = next(
        entry
        for entry in state.log_history
        if entry["step"] > 0 and entry.get(f"eval_{select_by}") == state.best_metric
    )
    return TrainingReport(
        state.global_step, round(kept["epoch"]), kept["eval_auc"], kept["eval_loss"]
    )
