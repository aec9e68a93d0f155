"""Supervised fine-tuning of the recommender (paper, section Method, step 3).

The loss is computed on the answer token alone, which a forward over the prompt predicts. (The
paper's likelihood of all tokens spends nearly all of its signal on text that is given.)

The vision tower computes each image once for the whole training, as far as features fit into
memory, and pairs with a shared prefix in a batch are packed, both where the model's family supports
it (:mod:`mllm_msr.engines.families`). The loss is that of the pairs one by one.

Several processes share each optimizer step (:mod:`mllm_msr.training.processes`).
"""

import contextlib
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import (
    broadcast_object_list,
    disable_fsdp_ram_efficient_loading,
    gather_object,
    send_to_device,
)
from dvclive import Live
from peft import PeftModel
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from mllm_msr.core.errors import ModelError, ParamsError, explain_out_of_memory
from mllm_msr.core.files import atomic_write, explain_write_errors, file_digest, make_folder
from mllm_msr.core.params import SftParams
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.packing import Packer, make_packer
from mllm_msr.engines.prompt import Prompt
from mllm_msr.method.adapters import add_adapter
from mllm_msr.method.examples import Example, Question
from mllm_msr.training.batching import GroupSampler
from mllm_msr.training.files import CURVES, write_empty_curves
from mllm_msr.training.losses import listwise_loss, yes_no_loss
from mllm_msr.training.processes import Division, SharedExamples, ShareSampler
from mllm_msr.training.schedule import Schedule
from mllm_msr.training.sharding import (
    configure_sharding,
    gather_adapter,
    gather_optimizer_state,
    load_adapter_weights,
    shard_optimizer_state,
)

log = logging.getLogger(__name__)

LOGGED_STEPS = 50  # approximate number of points of the training curve
CHECKPOINT_SECONDS = 600  # between checkpoints, at most; each epoch ends with one
RECOMPUTED_WEIGHTS = 500_000_000  # larger models recompute activations on a GPU, for its memory
DIGESTS = "digests.json"  # of the files of a checkpoint
FROM_CHECKPOINT = "it resumes from the last checkpoint"  # after an error
PAIRS_PER_IMAGE = 4  # or sequence, in a batch; with more, it has too few different items

BatchPrompts = Callable[[Sequence[Prompt]], Iterable[list[int]]]


@dataclass(frozen=True)
class TrainingReport:
    """The result of a fine-tuning.

    Attributes:
        steps: Optimizer steps; 0 leaves the model unchanged.
        epoch: The selected epoch; 0 without training.
        valid_auc: Its AUC, averaged over validation sequences; None without training.
        valid_loss: Its loss on the validation sequences; None without training.
    """

    steps: int
    epoch: int
    valid_auc: float | None
    valid_loss: float | None


class AnswerTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the loss on the answer token.

    Upstream: overrides of ``transformers.trainer.Trainer``, transformers>=5.23,<6. Four are public,
    ``get_train_dataloader``, ``compute_loss``, ``evaluate`` and ``save_model``; these are not, or
    not documented:

    - ``callback_handler``: the progress bar of a validation;
    - ``floating_point_ops``: its estimate needs ``input_ids``, which packed batches nest;
    - ``_save_checkpoint`` and ``_determine_best_metric``: Trainer saves after a validation only;
    - ``model_accepts_loss_kwargs``: otherwise Trainer expects a loss summed over tokens;
    - ``is_fsdp_enabled``, ``_load_from_checkpoint``, ``_load_best_model``,
      ``_load_optimizer_and_scheduler``, ``_save_optimizer_and_scheduler`` and ``_save``: with FSDP,
      Trainer's own checkpoints fit no training without it;
    - ``_save_rng_state``: each process writes its own, and the last file must be Trainer's state.
    """

    control: TrainerControl
    is_fsdp_enabled: bool

    def __init__(
        self,
        answer_token_ids: tuple[int, int],
        packer: Packer | None,
        schedule: Schedule,
        division: Division,
        batch_prompts: BatchPrompts,
        listwise: bool,
        **options: Any,
    ) -> None:
        """Take the parts of a training.

        Args:
            answer_token_ids: Of yes and no.
            packer: Runs batches; None where prompts run padded.
            schedule: The epochs and validations.
            division: Of the training steps among processes.
            batch_prompts: Groups validation prompts into batches of their indices.
            listwise: Whether to train on whole sequences; validation is always pair by pair.
            options: The arguments of Trainer.
        """
        super().__init__(**options)
        self.answer_token_ids, self.packer = answer_token_ids, packer
        self.schedule, self.division = schedule, division
        self.batch_prompts, self.listwise = batch_prompts, listwise
        self.model_accepts_loss_kwargs = False  # the loss is a mean over its own batch
        self.saved_step = 0  # of the last checkpoint

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this process's shares of each epoch."""
        return DataLoader(
            SharedExamples(cast("Sequence[Example]", self.train_dataset)),
            sampler=ShareSampler(self.schedule, self.division),
            collate_fn=self._collate_share,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _collate_share(self, loaded: list[tuple[list[Example], float]]) -> dict[str, Any]:
        """Encode a share; the loader gives them one by one."""
        ((examples, weight),) = loaded
        return cast("dict[str, Any]", self.data_collator(examples)) | {"weight": weight}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: Trainer's estimate is wrong for packed batches."""
        del inputs
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch or a share; see :mod:`mllm_msr.training.losses`."""
        del num_items_in_batch
        weight = inputs.pop("weight", 1.0)
        inputs = send_to_device(inputs, self.args.device)
        logits, labels = self._run(model, inputs), inputs["answer_token_ids"]
        if self.listwise:
            yes, no = self.answer_token_ids
            log_odds = logits[:, yes] - logits[:, no]
            loss = listwise_loss(log_odds, labels == yes, inputs["sequences"])
        else:
            loss = yes_no_loss(logits, labels)
        loss = loss * weight
        return (loss, logits) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate in packed batches, as scoring does; log and return loss and AUC.

        Processes share the batches. The epoch before is saved first.
        """
        validation = cast("Sequence[Example]", self.eval_dataset)
        examples = [validation[index] for index in self.schedule.take(trains=False)]
        process, processes = self.args.process_index, self.args.world_size
        prompts = [example.prompt for example in examples]
        # The memory that is free decides on batches, and they must be the same in all processes.
        found = list(self.batch_prompts(prompts)) if self.is_world_process_zero() else None
        every: list[list[int]] = broadcast_object_list([found])[0]
        batches = every[process::processes]
        own = len(batches)
        # Processes with sharded weights run as many forwards as the others.
        batches += every[: -(-len(every) // processes) - own]
        if self.packer:
            self.packer.enqueue(prompts[index] for batch in batches for index in batch)
        dataset: Any = [[examples[index] for index in batch] for batch in batches]
        loader = DataLoader(dataset, batch_size=None, collate_fn=self.data_collator)
        self.callback_handler.eval_dataloader = loader
        pairs: list[tuple[int, float, float]] = []  # index, log-odds, mean loss of its batch
        self.model.eval()
        loaded = iter(loader)  # draws a seed: before the checkpoint, which has the random state
        if self.state.global_step:
            self._save_checkpoint(self.model, None)
        for batch, inputs in zip(batches, loaded, strict=True):
            loss, log_odds = self._validate(inputs)
            pairs += [(*pair, loss) for pair in zip(batch, log_odds, strict=True)]
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        pairs = pairs[: sum(map(len, batches[:own]))]
        indices, scores, losses = zip(*gather_object(pairs), strict=True)
        auc = measure_auc([examples[index].question for index in indices], np.array(scores))
        metrics = {"eval_auc": auc, "eval_loss": float(np.mean(losses))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.state.global_step:
            self._determine_best_metric(metrics, None)
            self._save_checkpoint(self.model, None)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        """Save a checkpoint; after a validation only the state, since nothing else has changed."""
        if self.saved_step != self.state.global_step:
            super()._save_checkpoint(model, trial)
            self.saved_step = self.state.global_step
            return
        folder = Path(self.args.output_dir) / f"checkpoint-{self.saved_step}"
        if self.state.best_global_step == self.saved_step:
            self.state.best_model_checkpoint = str(folder)
        if self.args.should_save:
            with atomic_write(folder / "trainer_state.json") as temporary:
                self.state.save_to_json(str(temporary))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, unsharded."""
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=gather_adapter(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the state of the optimizer, unsharded, and of the learning rate."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save each process's random state; a checkpoint is complete once all are written."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_digests(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the adapter, sharded if the model is."""
        if self.is_fsdp_enabled:
            load_adapter_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the adapter of the best checkpoint, sharded if the model is."""
        if self.is_fsdp_enabled:
            load_adapter_weights(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of the optimizer, sharded if the model is, and of the learning rate."""
        is_sharded, self.is_fsdp_enabled = self.is_fsdp_enabled, False  # the files are not
        if is_sharded:
            self.optimizer.optimizer.register_load_state_dict_pre_hook(shard_optimizer_state)
        super()._load_optimizer_and_scheduler(checkpoint)
        self.is_fsdp_enabled = is_sharded

    @torch.no_grad()
    def _validate(self, inputs: dict[str, Any]) -> tuple[float, list[float]]:
        """Return the mean loss of a batch, and the log-odds of yes against no of its pairs."""
        inputs = send_to_device(inputs, self.args.device)
        yes, no = self.answer_token_ids
        logits = self._run(self.model, inputs)
        log_odds: list[float] = (logits[:, yes] - logits[:, no]).tolist()
        return float(yes_no_loss(logits, inputs["answer_token_ids"])), log_odds

    def _run(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the logits after each prompt, (batch, vocabulary), in float32."""
        if self.packer:
            return self.packer.run(model, inputs["packed"]).float()
        padded = {name: inputs[name] for name in inputs.keys() - {"answer_token_ids", "sequences"}}
        return cast(torch.Tensor, model(**padded, logits_to_keep=1).logits[:, -1].float())


class Curves(TrainerCallback):  # type: ignore[misc]
    """Writes the training curves with DVCLive, in the main process.

    At each log all points are written again from Trainer's history, so that a resumed run has each
    point once.
    """

    def __init__(self, folder: Path) -> None:
        """Take DVCLive's output folder."""
        self._folder = folder

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write all points so far."""
        del args, control
        if state.is_world_process_zero:
            write_curves(state.log_history, self._folder)


class TimedCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint within an epoch once the last is older than ``CHECKPOINT_SECONDS``."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        del args, state, control
        self._saved = time.monotonic()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock again."""
        del args, state, control
        self._saved = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let Trainer save if it is time; the main process decides for all.

        The validation after an epoch saves its last step.
        """
        del args
        if state.epoch % 1:
            due = [time.monotonic() - self._saved >= CHECKPOINT_SECONDS]
            control.should_save |= broadcast_object_list(due)[0]


class Progress(ProgressCallback):  # type: ignore[misc]
    """Shows the latest metrics in the progress bar, not as lines between two bars.

    Upstream: reads ``training_bar`` of ``transformers.trainer_callback.ProgressCallback``,
    transformers>=5.23,<6, which has no method for a postfix.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start without metrics."""
        super().on_train_begin(args, state, control)
        self._metrics: dict[str, float] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the new metrics to the progress bar."""
        del args, control
        if state.is_world_process_zero and self.training_bar is not None:
            self._metrics |= {key: logs[key] for key in CURVES if logs and key in logs}
            self.training_bar.set_postfix(self._metrics)


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuning without its examples.

    Attributes:
        model: The base model.
        answer_token_ids: Of yes and no.
        params: The section ``sft``.
        work: Folder of checkpoints: one per epoch, before its validation, and others by time.
            Training resumes from the last of them.
        out: Folder of the results.
    """

    model: LocalModel
    answer_token_ids: tuple[int, int]
    params: SftParams
    work: Path
    out: Path

    def run(self, train: Sequence[Example], valid: Sequence[Example]) -> TrainingReport:
        """Train an adapter; write it with its curves.

        Args:
            train: Training examples.
            valid: Examples of whole validation sequences, sequence by sequence.

        Raises:
            ModelError: The training diverged, memory ran out, or the dtype is float16, which would
                need loss scaling.
        """
        if self.model.dtype == torch.float16:
            fix = "set bfloat16 or float32"
            raise ModelError(
                expected="a dtype to train in", got="float16", where="MLLM_MSR_DTYPE", fix=fix
            )
        self._require_process_per_gpu()
        set_seed(self.params.seed)
        lora = self.params.lora
        disable_fsdp_ram_efficient_loading()  # other processes than the first would have no weights
        base = self.model.load()
        adapted = add_adapter(base, lora.rank, lora.alpha, lora.dropout, lora.layers)
        if self.params.epochs == 0:
            if PartialState().is_main_process:
                write_curves([], self.out / "curves")
                _save(adapted, self.out / "adapter", gather_adapter(adapted))
            return TrainingReport(0, 0, None, None)
        checkpoint: str | None = broadcast_object_list([last_checkpoint(self.work)])[0]
        state = read_state(checkpoint) if checkpoint else TrainerState()
        schedule = self.schedule(train, valid, state.train_batch_size)
        trainer = self._trainer(adapted, train, valid, schedule)
        trainer.saved_step = state.global_step
        trainer.args.eval_on_start = schedule.start(state.epoch or 0, is_validated(state))
        if process := PartialState().process_index:
            torch.manual_seed(self.params.seed + process)  # else all drop out the same activations
        what = f"a batch of {self.params.batch_size} pairs"
        with (
            explain_out_of_memory(what, "sft", self._smaller()),
            explain_write_errors(self.work, "a checkpoint", FROM_CHECKPOINT),
        ):
            trainer.train(resume_from_checkpoint=checkpoint)
        assert schedule.is_done(), "a training that ended before its schedule"
        weights = gather_adapter(adapted)
        if trainer.is_world_process_zero():
            _save(adapted, self.out / "adapter", weights)
            write_curves(trainer.state.log_history, self.out / "curves")
        trainer.accelerator.wait_for_everyone()  # the best checkpoint may still be read
        return read_report(trainer.state, self.params.select_by)

    def _require_process_per_gpu(self) -> None:
        """Raise an error where Trainer would run one process on several GPUs.

        Raises:
            ModelError: It would.
        """
        on_cuda = self.model.device.type == "cuda"
        if (
            self.params.epochs
            and on_cuda
            and torch.cuda.device_count() > 1
            and not is_distributed()
        ):
            fix = "accelerate launch --num_processes N, or show one in CUDA_VISIBLE_DEVICES"
            got = f"one for {torch.cuda.device_count()} GPUs"
            raise ModelError(expected="a process for each GPU", got=got, where="sft", fix=fix)

    def finish(self) -> None:
        """Remove the checkpoints; call it once all results are written."""
        shutil.rmtree(self.work, ignore_errors=True)

    def schedule(
        self,
        train: Sequence[Example],
        valid: Sequence[Example],
        batch_size: int | None = None,
    ) -> Schedule:
        """Return the passes of the training; a dry run counts their pairs.

        Args:
            train: Training examples.
            valid: Validation examples.
            batch_size: Of the checkpoint from which the training resumes. The order depends on it,
                and must not change within an epoch.

        Raises:
            ParamsError: A batch of the listwise loss would not consist of whole sequences.
        """
        order = self._order(train, batch_size or self.params.batch_size)
        return Schedule(self.params.epochs, order, len(valid))

    def _divide(self, train: Sequence[Example]) -> Division:
        """Return the division of the steps among processes.

        Raises:
            ParamsError: The processes cannot share a step evenly.
        """
        listwise = self.params.loss == "listwise"
        return Division(
            PartialState().num_processes,
            PartialState().process_index,
            self.params.batch_size,
            self.params.accumulation,
            unit=_count_candidates(train) if listwise else 1,
        )

    def _trainer(
        self,
        adapted: PeftModel,
        train: Sequence[Example],
        valid: Sequence[Example],
        schedule: Schedule,
    ) -> AnswerTrainer:
        division = self._divide(train)
        make_folder(self.work)
        encoder = self.model.encoder
        packer = make_packer(encoder, adapted.get_base_model(), self.model.budget)
        trainer = AnswerTrainer(
            answer_token_ids=self.answer_token_ids,
            packer=packer,
            schedule=schedule,
            division=division,
            batch_prompts=packer.batches if packer else self.model.padded_batches,
            listwise=self.params.loss == "listwise",
            model=adapted,
            args=self._arguments(len(train), adapted.num_parameters(), division.forwards),
            data_collator=partial(collate, encoder, packer, self.answer_token_ids),
            train_dataset=train,
            eval_dataset=valid,
            callbacks=[Curves(self.out / "curves"), TimedCheckpoints, Progress],
        )
        trainer.remove_callback(ProgressCallback)
        if trainer.is_fsdp_enabled:
            plugin = trainer.accelerator.state.fsdp_plugin
            configure_sharding(plugin, adapted.get_base_model(), self.model.four_bit)
        return trainer

    def _order(self, train: Sequence[Example], size: int) -> GroupSampler:
        """Return the order of training pairs: grouped by what their prompts begin with.

        That is the image or, without one, the preference, which pairs of a sequence share. The
        listwise loss needs whole sequences.

        Raises:
            ParamsError: A batch of the listwise loss would not consist of whole sequences.
        """
        seed = self.params.seed
        lengths = [self.model.encoder.count_tokens(example.prompt) for example in train]
        if self.params.loss == "yes_no":
            groups = [example.prompt.image or example.question.sequence for example in train]
            return GroupSampler(groups, lengths, PAIRS_PER_IMAGE, size, seed)
        sequences = [example.question.sequence for example in train]
        candidates = _count_candidates(train)
        if self.params.batch_size % candidates:
            fix = "choose one, or set sft.loss to yes_no"
            raise ParamsError(
                expected=f"a multiple of the {candidates} candidates of a training sequence",
                got=str(self.params.batch_size),
                where="sft.batch_size",
                fix=fix,
            )
        return GroupSampler(sequences, lengths, candidates, size, seed)

    def _smaller(self) -> str:
        """Return what to do when memory runs out, with the same number of pairs per step."""
        size, accumulation = self.params.batch_size, self.params.accumulation
        if size == 1:
            return "use recommender.four_bit, smaller images, shorter prompts or a smaller model"
        half = size // 2
        more = f"{2 * accumulation}" if size % 2 == 0 else f"more than {accumulation}"
        return (
            f"set sft.batch_size to {half} and sft.accumulation to {more}; run again, "
            "it resumes from the last checkpoint if a step has as many pairs as before"
        )

    def _arguments(self, pairs: int, weights: int, forwards: int) -> TrainingArguments:
        """Return Trainer's arguments.

        Args:
            pairs: Training pairs.
            weights: Number of the model's weights.
            forwards: Of each process, in an optimizer step.
        """
        params = self.params
        on_cuda = self.model.device.type == "cuda"
        steps = params.epochs * pairs / (params.batch_size * params.accumulation)
        return TrainingArguments(
            output_dir=str(self.work),
            num_train_epochs=params.epochs,
            learning_rate=params.learning_rate,
            lr_scheduler_type=params.schedule,
            warmup_steps=params.warmup_share,  # below 1: a share of all steps
            per_device_train_batch_size=params.batch_size,
            gradient_accumulation_steps=forwards,
            max_grad_norm=params.max_gradient_norm,
            seed=params.seed,
            bf16=self.model.dtype == torch.bfloat16,
            use_cpu=self.model.device.type == "cpu",
            activation_checkpointing=on_cuda and weights >= RECOMPUTED_WEIGHTS,
            activation_checkpointing_kwargs={"use_reentrant": False},
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,  # the best and the last, until all results are written
            load_best_model_at_end=True,
            metric_for_best_model=params.select_by,
            greater_is_better=params.select_by == "auc",
            logging_steps=max(1, int(steps / LOGGED_STEPS)),
            remove_unused_columns=False,
            dataloader_pin_memory=on_cuda,
            report_to="none",
        )


def _count_candidates(train: Sequence[Example]) -> int:
    """Return the number of candidates of a training sequence."""
    return max(Counter(example.question.sequence for example in train).values(), default=1)


def is_distributed() -> bool:
    """Return whether a launcher started this process, possibly as one of several."""
    return bool(PartialState().distributed_type != DistributedType.NO)


def collate(
    encoder: Encoder,
    packer: Packer | None,
    answer_token_ids: tuple[int, int],
    examples: Sequence[Example],
) -> dict[str, Any]:
    """Encode a batch.

    Returns:
        ``answer_token_ids``, the token ids of the right answers, and ``sequences``, (batch,) each;
        then ``packed`` or the inputs of a padded forward. Trainer derives the batch size from the
        first entry.
    """
    yes, no = answer_token_ids
    labels = torch.tensor([yes if example.question.label else no for example in examples])
    prompts = [example.prompt for example in examples]
    inputs = {"packed": packer.pack(prompts)} if packer else encoder.encode(prompts)
    sequences = torch.tensor([example.question.sequence for example in examples])
    return {"answer_token_ids": labels, "sequences": sequences} | inputs


def read_state(checkpoint: str) -> TrainerState:
    """Read Trainer's state of a checkpoint."""
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


def is_validated(state: TrainerState) -> bool:
    """Return whether the validation after the last step of a state is done."""
    return any(
        entry["step"] == state.global_step and "eval_loss" in entry for entry in state.log_history
    )


def write_digests(checkpoint: Path) -> None:
    """Record the digest of each file of a checkpoint, all but Trainer's state, which changes."""
    digests = {file.name: file_digest(file) for file in sorted(checkpoint.iterdir())}
    (checkpoint / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")


def is_intact(checkpoint: Path) -> bool:
    """Return whether all files of a checkpoint are as they were written."""
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
        return all(file_digest(checkpoint / name) == known for name, known in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def last_checkpoint(work: Path) -> str | None:
    """Return the last complete checkpoint: Trainer writes its state last.

    A damaged one counts as missing, so that no training resumes from wrong numbers.

    Upstream: the folders ``checkpoint-*`` and the file ``trainer_state.json`` with ``global_step``
    of ``transformers.trainer.Trainer``, transformers>=5.23,<6. Trainer's own
    ``get_last_checkpoint`` also returns incomplete ones.
    """
    complete = {}
    for state in work.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # killed while it wrote it
            step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
            if is_intact(state.parent):
                complete[step] = state.parent
            else:
                log.warning("%s is damaged and counts as missing; check the disk", state.parent)
    return str(complete[max(complete)]) if complete else None


def measure_auc(questions: Sequence[Question], scores: "np.ndarray[Any, Any]") -> float:
    """Return the AUC averaged over validation sequences; a tie counts half (scikit-learn's).

    Args:
        questions: The pairs.
        scores: Their log-odds, (pairs,).

    Raises:
        ModelError: Scores are not finite.
    """
    if not np.isfinite(scores).all():
        fix = "lower sft.learning_rate or sft.max_gradient_norm"
        raise ModelError(
            expected="finite scores", got="a training that diverged", where="sft", fix=fix
        )
    sequences = np.array([question.sequence for question in questions])
    labels = np.array([question.label for question in questions])
    areas = [
        roc_auc_score(labels[sequences == sequence], scores[sequences == sequence])
        for sequence in np.unique(sequences)
    ]
    return float(np.mean(areas))


def write_curves(history: Sequence[Mapping[str, float]], folder: Path) -> None:
    """Write the curves of a training: one file per metric, a row per step.

    Raises:
        DataError: The disk is full or read-only.
    """
    if not history:
        write_empty_curves(folder)
        return
    with (
        explain_write_errors(folder, "the curves", FROM_CHECKPOINT),
        Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None) as live,
    ):
        for entry in history:
            live.step = int(entry["step"])
            for key in [key for key in CURVES if key in entry]:  # always in the same order
                live.log_metric(CURVES[key], entry[key])


def sample_sequences(questions: Sequence[Question], sequences: int, seed: int) -> list[Question]:
    """Return the questions of a seeded sample of at most ``sequences`` sequences, in order."""
    every = sorted({question.sequence for question in questions})
    if len(every) <= sequences:
        return list(questions)
    chosen = set(np.random.default_rng(seed).choice(every, sequences, replace=False).tolist())
    return [question for question in questions if question.sequence in chosen]


def _save(adapted: PeftModel, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    with atomic_write(folder) as temporary:
        adapted.save_pretrained(str(temporary), state_dict=weights, save_embedding_layers=False)


def read_report(state: TrainerState, select_by: str) -> TrainingReport:
    """Read the selected epoch and its metrics from Trainer's history."""
    kept = next(
        entry
        for entry in state.log_history
        if entry["step"] > 0 and entry.get(f"eval_{select_by}") == state.best_metric
    )
    return TrainingReport(
        state.global_step, round(kept["epoch"]), kept["eval_auc"], kept["eval_loss"]
    )
