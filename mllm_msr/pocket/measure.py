"""Evaluation of the pocket model on a fresh world, and its model card.

Example: python -m mllm_msr.pocket.measure trained mllm_msr/pocket/model
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
import typer
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mllm_msr.core.files import atomic_write
from mllm_msr.method import prompts
from mllm_msr.pocket import lessons
from mllm_msr.pocket.chats import Chats
from mllm_msr.pocket.train import load
from mllm_msr.pocket.world import (
    ATTRIBUTES,
    IMAGE_ATTRIBUTES,
    TEXT_ATTRIBUTES,
    Item,
    World,
    make_world,
)

FRESH_SEED: Final = 9_000_000
"""Seed of the evaluation world; neither a training world nor the demo has it."""
ITEMS: Final = 400
USERS: Final = 300
LONGEST_HISTORY: Final = 9
ANSWER_TOKENS: Final = 40
BATCH: Final = 50

Figures = dict[str, float]
CARD: Final = Path(__file__).with_name("card.md")


class Asker:
    """Generates answers as the pipeline does: one user turn, greedy decoding."""

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        """Store the model and its processor."""
        self.model = model.eval()
        self.chats = Chats(processor)

    @torch.inference_mode()
    def ask(self, chats: Sequence[lessons.Lesson]) -> list[str]:
        """Return the model's answer to the first question of each lesson."""
        answers: list[str] = []
        for start in range(0, len(chats), BATCH):
            inputs = self.chats.open(chats[start : start + BATCH])
            written = self.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS)
            new = written[:, inputs["input_ids"].shape[1] :]
            answers += self.chats.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers


def measure(asker: Asker, templates: lessons.Templates) -> dict[str, Figures]:
    """Measure every skill on one fresh world.

    Returns:
        Shares between 0 and 1, by skill and attribute.
    """
    world = make_world(FRESH_SEED, USERS, ITEMS)
    generator = np.random.default_rng(FRESH_SEED)
    seen = asker.ask([lessons.teach_description(templates, item) for item in world.items])
    read = asker.ask([lessons.teach_summary(templates, i, generator) for i in world.items])
    fused = asker.ask([lessons.teach_fusion(templates, item) for item in world.items])
    own = asker.ask(
        [
            lessons.Lesson([lessons.Turn(prompts.fusion(templates.summaries, text, image), "")])
            for text, image in zip(read, seen, strict=True)
        ]
    )
    return {
        "description": share_mentioned(world.items, seen, tuple(IMAGE_ATTRIBUTES)),
        "text_summary": share_mentioned(world.items, read, tuple(TEXT_ATTRIBUTES)),
        "fusion": {"exact": _mean(map(str.__eq__, map(lessons.fuse, world.items), fused))},
        "preference": measure_preferences(asker, templates, world, own),
    } | measure_questions(asker, world.items, generator)


def share_mentioned(items: Sequence[Item], texts: Sequence[str], names: Sequence[str]) -> Figures:
    """Return the share of texts with the word of the item's value, by attribute."""
    words = [set(re.findall(r"\w+", text)) for text in texts]  # "checkered" does not mention red
    return {
        name: _mean(item.values[name] in said for item, said in zip(items, words, strict=True))
        for name in names
    }


def measure_preferences(
    asker: Asker, templates: lessons.Templates, world: World, summaries: Sequence[str]
) -> Figures:
    """Infer preferences recurrently from the model's own summaries; compare with the true tastes.

    ``rule_*`` are the results of the rule that the model was taught, on the true attributes.
    """
    histories = [user.items[:-1][-LONGEST_HISTORY:] for user in world.users]
    stated: list[str | None] = [None] * len(histories)
    ruled: list[lessons.Taste | None] = [None] * len(histories)
    for start in range(0, LONGEST_HISTORY, lessons.BLOCK):
        going = [n for n, history in enumerate(histories) if len(history) > start]
        blocks = {n: histories[n][start : start + lessons.BLOCK] for n in going}
        asked = [
            prompts.preference(templates.preferences, [summaries[i] for i in blocks[n]], stated[n])
            for n in going
        ]
        answers = asker.ask([lessons.Lesson([lessons.Turn(prompt, "")]) for prompt in asked])
        for n, answer in zip(going, answers, strict=True):
            stated[n] = answer
            ruled[n] = lessons.infer_taste([world.items[i] for i in blocks[n]], ruled[n])
    tastes = [user.taste for user in world.users]
    read = [lessons.read_preference(text or "") for text in stated]
    figures = {"as_taught": _mean(r == (t or {}) for r, t in zip(read, ruled, strict=True))}
    figures |= compare(read, tastes, "")
    return figures | compare([rule or {} for rule in ruled], tastes, "rule_")


def compare(
    found: Sequence[lessons.Taste], tastes: Sequence[lessons.Taste], prefix: str
) -> Figures:
    """Return precision and recall of the liked values found."""
    right = sum(len(f.items() & t.items()) for f, t in zip(found, tastes, strict=True))
    return {
        f"{prefix}precision": right / max(1, sum(map(len, found))),
        f"{prefix}recall": right / sum(map(len, tastes)),
    }


def measure_questions(
    asker: Asker, items: Sequence[Item], generator: np.random.Generator
) -> dict[str, Figures]:
    """Return the share of correct answers to questions about one attribute, with the image.

    Returns:
        ``reading``: questions for the liked or the item's value; ``question``: whether it fits.
    """
    right: dict[str, dict[str, list[bool]]] = {
        skill: {name: [] for name in ATTRIBUTES} for skill in ("reading", "question")
    }
    chats = [lessons.teach_questions(item, generator, True, 4) for item in items for _ in range(4)]
    for chat, answer in zip(chats, asker.ask(chats), strict=True):
        turn = chat.turns[0]
        name, skill = _find_question(str(turn.prompt))
        right[skill][name].append(answer == turn.answer)
    return {
        skill: {name: _mean(answers) for name, answers in by_name.items()}
        | {"image": _mean(a for name in IMAGE_ATTRIBUTES for a in by_name[name])}
        | {"text": _mean(a for name in TEXT_ATTRIBUTES for a in by_name[name])}
        for skill, by_name in right.items()
    }


def _find_question(prompt: str) -> tuple[str, str]:
    """Return the attribute that a prompt asks about, and the skill that it tests."""
    forms = {
        lessons.LIKED_VALUE_QUESTION: "reading",
        lessons.ITEM_VALUE_QUESTION: "reading",
        lessons.FIT_QUESTION: "question",
    }
    return next(
        (name, skill)
        for form, skill in forms.items()
        for name in ATTRIBUTES
        if prompt.endswith(form.format(attribute=name))
    )


def write_card(figures: dict[str, Figures], path: Path) -> None:
    """Write the model card with its table of results."""
    rows = [
        f"| {skill} | {name.replace('_', ' ')} | {value:.3f} |"
        for skill, by_name in figures.items()
        for name, value in by_name.items()
    ]
    table = "\n".join(["| skill | what | share |", "|---|---|---|", *rows])
    path.write_text(CARD.read_text(encoding="utf-8").replace("{figures}", table), encoding="utf-8")


def main(
    source: Path,
    target: Path,
    figures_file: Path = Path("mllm_msr/pocket/figures.json"),
    prompt_file: Path = Path("prompts.yaml"),
) -> None:
    """Measure a trained model, and write it with its card to the shipped folder."""
    figures = measure(Asker(*load(source)), lessons.Templates.load(prompt_file))
    figures = {s: {n: round(v, 4) for n, v in f.items()} for s, f in figures.items()}
    with atomic_write(target) as temporary:
        shutil.copytree(source, temporary)
        (temporary / "model.safetensors").chmod(0o644)
        write_card(figures, temporary / "README.md")
    with atomic_write(figures_file) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    typer.echo(f"wrote {target} and {figures_file}: {len(figures)} skills measured")


def _mean(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))


if __name__ == "__main__":
    typer.run(main)
