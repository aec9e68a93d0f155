"""Inference behind the response store: puts prompts to a model, each once.

What the response store has is not computed again. The model runs in this process (``cached.py``),
behind a server (``server.py``), or on the workers of a Ray cluster (``pooled.py``, ``workers.py``).
A dry run has the same code use a :class:`CountingEngine`, which computes nothing.
"""

from functools import partial

from mllm_msr.core.errors import ParamsError
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import ResponseStore
from mllm_msr.method.inference.cached import (
    CachedEngine,
    Conversation,
    Engine,
    GeneratingModel,
    StoringEngine,
    converse_in_rounds,
    in_one_step,
)
from mllm_msr.method.inference.counting import CountingEngine
from mllm_msr.method.inference.pooled import pooled_engine
from mllm_msr.method.inference.server import ServerModel
from mllm_msr.method.inference.workers import has_cluster

__all__ = [
    "CachedEngine",
    "Conversation",
    "CountingEngine",
    "Engine",
    "GeneratingModel",
    "StoringEngine",
    "converse_in_rounds",
    "greedy_engine",
    "in_one_step",
    "open_generator",
]


def open_generator(encoder: Encoder, section: str, engine: str) -> GeneratingModel:
    """Return the model that generates a section's texts.

    Args:
        encoder: Of the model.
        section: Of the settings.
        engine: ``local`` or ``server``.

    Raises:
        ParamsError: There is no address of a server.
        ModelError: The configuration describes no model that transformers can build.
    """
    return ServerModel(encoder, section) if engine == "server" else LocalModel(encoder)


def greedy_engine(
    model: GeneratingModel, store: ResponseStore, max_new_tokens: int, *, spread: bool = False
) -> StoringEngine:
    """Return the engine for greedy decoding of at most ``max_new_tokens`` tokens.

    Args:
        model: The model.
        store: The response store.
        max_new_tokens: The longest response in tokens.
        spread: Whether to spread a local model's prompts over the cluster, where there is one.

    Raises:
        ParamsError: They leave no room for a prompt in the model's context.
    """
    context, name = model.encoder.context, model.encoder.name
    if max_new_tokens >= context:
        expected = f"fewer new tokens than the {context:,} of the model's context"
        fix = "lower it, or use a model with a longer context"
        raise ParamsError(
            expected=expected,
            got=f"{max_new_tokens:,}",
            where=f"max_new_tokens, {name}",
            fix=fix,
        )
    limit = context - max_new_tokens
    settings: dict[str, str | int] = {"decoding": "greedy", "max_new_tokens": max_new_tokens}
    if spread and isinstance(model, LocalModel) and has_cluster():
        open_engine = partial(greedy_engine, model, max_new_tokens=max_new_tokens)
        return pooled_engine(model.encoder, open_engine, store, limit, _length, **settings)
    generate = partial(model.generate, max_new_tokens=max_new_tokens)
    return CachedEngine(model, store, limit, model.batches, generate, **settings)


def _length(prompt: Prompt) -> int:
    """Return a key that sorts the longest prompts first, as :meth:`LocalModel.batches` does."""
    return -len(prompt.before) - len(prompt.after)
