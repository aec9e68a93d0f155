"""Training of the pocket model: vision tower, language model, their alignment, then all weights.

Each command reads the folder of the previous step and writes its own; the DVC pipeline in
``training/`` runs them in order. The training worlds have other seeds than the demo.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import torch
import typer
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm_msr.core.files import atomic_write
from mllm_msr.method import prompts
from mllm_msr.pocket import lessons
from mllm_msr.pocket.chats import Batch, Chats
from mllm_msr.pocket.model import build_model, build_processor, build_tokenizer
from mllm_msr.pocket.world import ATTRIBUTES, IMAGE_ATTRIBUTES, KINDS, SIZES, Item, World

FIRST_SEED: Final = 1_000_000
"""Seed of the first training world; far above that of the demo."""
WORLDS: Final = 10
USERS: Final = 400
ITEMS: Final = 600
IMAGES_PER_BATCH: Final = 64

Seed = Annotated[int, typer.Option(help="Seed of weights and lessons.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps.")]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def build(target: Path, prompt_file: Path = Path("prompts.yaml"), seed: Seed = 0) -> None:
    """Build the tokenizer and the model with random weights.

    Example: python -m mllm_msr.pocket.train build untrained
    """
    words = [*KINDS, *SIZES, *(value for values in ATTRIBUTES.values() for value in values)]
    questions = (lessons.FIT_QUESTION, lessons.LIKED_VALUE_QUESTION, lessons.ITEM_VALUE_QUESTION)
    likings = [question.format(attribute=name) for question in questions for name in ATTRIBUTES]
    sections = ("summarize_items", "infer_preferences", "recommender")
    rendered = [t for s in sections for t in prompts.load_prompts(s, prompt_file).values()]
    sample = make_sample(lessons.Templates.load(prompt_file))
    spoken = [f" {form}" for word in words for form in (word, word.capitalize())]
    texts = [*spoken, *(w.capitalize() for w in words), *likings, *rendered, "yes", "no", "Any"]
    tokenizer = build_tokenizer([*texts * 20, *sample])
    save(build_model(tokenizer, seed), build_processor(tokenizer), target)


def make_sample(templates: lessons.Templates) -> list[str]:
    """Return texts of some lessons, to train the tokenizer on."""
    world = lessons.make_worlds(FIRST_SEED, 1, 50, 200)[0]
    generator = np.random.default_rng(FIRST_SEED)
    taught = [lessons.teach_preference(templates, world, generator) for _ in range(50)]
    taught += [lessons.teach_summary(templates, item, generator) for item in world.items]
    return [text for chat in taught for t in chat.turns for text in (t.prompt.before, t.answer)]


@app.command()
def vision(source: Path, target: Path, steps: Steps = 600, seed: Seed = 1) -> None:
    """Train the vision tower alone to classify the image attributes.

    Example: python -m mllm_msr.pocket.train vision untrained eyes
    """
    model, processor = load(source)
    items = [item for world in make_training_worlds() for item in world.items]
    images = Chats(processor).encode_images(items)  # (items, 3, 64, 64)
    labels = label_images(items)  # (items, attributes)
    generator = np.random.default_rng(seed)
    width = model.config.vision_config.hidden_size
    heads = nn.ModuleList(nn.Linear(width, len(v)) for v in IMAGE_ATTRIBUTES.values())
    tower = model.model.vision_tower

    def compute_losses() -> torch.Tensor:
        chosen = torch.from_numpy(generator.integers(len(items), size=IMAGES_PER_BATCH))
        states = tower(images[chosen]).last_hidden_state[:, 1:]  # (batch, patches, width)
        pooled = states.mean(dim=1)
        losses = [
            nn.functional.cross_entropy(head(pooled), labels[chosen, column])
            for column, head in enumerate(heads)
        ]
        return torch.stack(losses)

    optimize(nn.ModuleList([tower, heads]), compute_losses, steps, 1e-3)
    save(model, processor, target)


@app.command()
def align(source: Path, target: Path, steps: Steps = 300, seed: Seed = 4) -> None:
    """Align image patches with the language model's embeddings of the attribute values.

    This is LLaVA's first stage without captions: each patch is trained towards the sum of the
    embeddings of the values that the image shows.

    Example: python -m mllm_msr.pocket.train align tongue aligned
    """
    model, processor = load(source)
    items = [item for world in make_training_worlds() for item in world.items]
    images = Chats(processor).encode_images(items)  # (items, 3, 64, 64)
    labels = label_images(items)  # (items, attributes)
    words = embed_values(model, processor)
    generator = np.random.default_rng(seed)
    eyes = nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])

    def compute_losses() -> torch.Tensor:
        chosen = torch.from_numpy(generator.integers(len(items), size=IMAGES_PER_BATCH))
        states = eyes[0](images[chosen]).last_hidden_state[:, 1:]
        patches = nn.functional.normalize(
            eyes[1](states).float(), dim=-1
        )  # (batch, patches, width)
        shown = [embedding[labels[chosen, n]] for n, embedding in enumerate(words)]
        target_embedding = nn.functional.normalize(
            torch.stack(shown).sum(dim=0), dim=-1
        )  # (batch, width)
        distance = 1 - (patches * target_embedding[:, None]).sum(dim=-1).mean()
        losses = [
            nn.functional.cross_entropy(20 * patches.mean(dim=1) @ embedding.T, labels[chosen, n])
            for n, embedding in enumerate(words)
        ]
        return torch.stack([0.3 * distance, *losses])

    optimize(eyes, compute_losses, steps, 1e-3)
    save(model, processor, target)


def embed_values(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> list[torch.Tensor]:
    """Return the unit embeddings of each image attribute's values, each ``(values, width)``."""
    table = model.get_input_embeddings().weight.detach()
    ids = [
        processor.tokenizer.convert_tokens_to_ids([f"Ġ{value}" for value in values])
        for values in IMAGE_ATTRIBUTES.values()
    ]
    return [nn.functional.normalize(table[torch.tensor(row)], dim=-1) for row in ids]


def label_images(items: list[Item]) -> torch.Tensor:
    """Return the class of each image attribute, shape ``(items, attributes)``."""
    rows = [[of.index(item.values[n]) for n, of in IMAGE_ATTRIBUTES.items()] for item in items]
    return torch.tensor(rows)


@app.command()
def language(
    source: Path,
    target: Path,
    steps: Steps = 1600,
    seed: Seed = 2,
    prompt_file: Path = Path("prompts.yaml"),
) -> None:
    """Train the language model on text alone; descriptions replace images.

    Example: python -m mllm_msr.pocket.train language eyes tongue
    """
    model, processor = load(source)
    batches = teach(lessons.Templates.load(prompt_file), Chats(processor), seed, see=False)
    optimize(model.model.language_model, lambda: forward(model, next(batches)), steps, 2e-3)
    save(model, processor, target)


@app.command()
def together(
    source: Path,
    target: Path,
    steps: Steps = 1200,
    seed: Seed = 3,
    prompt_file: Path = Path("prompts.yaml"),
) -> None:
    """Train all weights on all lessons, with several questions about an image per chat.

    Example: python -m mllm_msr.pocket.train together aligned trained
    """
    model, processor = load(source)
    batches = teach(lessons.Templates.load(prompt_file), Chats(processor), seed, see=True)
    optimize(model, lambda: forward(model, next(batches)), steps, 2e-3)
    save(model, processor, target)


def make_training_worlds() -> list[World]:
    """Return the training worlds of all steps."""
    return lessons.make_worlds(FIRST_SEED, WORLDS, USERS, ITEMS)


def teach(
    templates: lessons.Templates, chats: Chats, seed: int, see: bool
) -> Iterator[list[Batch]]:
    """Yield, for each step, batches of lessons of similar length.

    Args:
        templates: The prompt templates.
        chats: The encoder of lessons.
        seed: Seed of the lessons.
        see: Show images; otherwise descriptions replace them.
    """
    worlds, generator = make_training_worlds(), np.random.default_rng(seed)

    def pick() -> Item:
        world = worlds[int(generator.integers(len(worlds)))]
        return world.items[int(generator.integers(len(world.items)))]

    def ask(likings: tuple[int, ...], see: bool) -> list[lessons.Lesson]:
        return [lessons.teach_questions(pick(), generator, see, number) for number in likings]

    few, many = (1, 2, 2, 3) * 2, (4, 6) * 3
    while True:
        world = worlds[int(generator.integers(len(worlds)))]
        short = [lessons.teach_summary(templates, pick(), generator) for _ in range(2)]
        short += [lessons.teach_fusion(templates, pick()) for _ in range(2)]
        users = [lessons.teach_preference(templates, world, generator) for _ in range(6)]
        if see:
            shown = [lessons.teach_description(templates, pick()) for _ in range(8)]
            seen = [shown, ask(few * 2, see=True), ask(many * 2, see=True)]
            groups = [short, users, ask(few[4:], see=False), ask(many[2:4], see=False), *seen]
        else:
            groups = [short, users, ask(few * 2, see=False), ask(many * 2, see=False)]
        yield [chats.encode(group) for group in groups]


def forward(model: LlavaForConditionalGeneration, batches: list[Batch]) -> torch.Tensor:
    """Return the loss of the answer tokens, shape ``(batches,)``."""
    losses = [
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            pixel_values=batch.pixel_values,
        ).loss
        for batch in batches
    ]
    return torch.stack(losses)


def optimize(
    module: nn.Module, compute_losses: Callable[[], torch.Tensor], steps: int, rate: float
) -> None:
    """Train with warm-up and linear decay, under bfloat16 autocast; print the losses.

    Muon updates the matrices inside the layers and AdamW all other weights: AdamW alone needs about
    twice as many steps.
    """
    optimizers = build_optimizers(module, rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(step / 20, 2 * (1 - step / steps), 1))
        for o in optimizers
    ]
    started, smooth = time.monotonic(), torch.zeros(())
    for step in range(1, steps + 1):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = compute_losses()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        smooth = losses.detach() if step == 1 else 0.95 * smooth + 0.05 * losses.detach()
        if step % 50 == 0:
            shown = " ".join(f"{loss:.3f}" for loss in smooth.tolist())
            elapsed = time.monotonic() - started
            typer.echo(f"step {step} of {steps}: losses {shown}, {elapsed:.0f} s", err=True)


def build_optimizers(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for all other weights."""
    named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    inner = [weight for name, weight in named if "layers." in name and weight.ndim == 2]
    chosen = {id(weight) for weight in inner}
    outer = [weight for _, weight in named if id(weight) not in chosen]
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def load(source: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load model and processor of a step."""
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    return model.train(), LlavaProcessor.from_pretrained(source)


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, target: Path) -> None:
    """Save model and processor as one folder, atomically."""
    with atomic_write(target) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    weights = sum(weight.numel() for weight in model.parameters())
    typer.echo(f"wrote {target}: {weights:,} weights")


if __name__ == "__main__":
    app()
