"""Generation of a whole batch, for tests that need no single steps."""

from collections.abc import Sequence

from mllm_msr.engines.decoding import Decoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import Response


def generate(
    model: LocalModel | Decoder, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[Response]:
    """Return the response to each prompt, in the prompts' order."""
    responses: dict[int, Response] = {}
    for step in model.generate(prompts, max_new_tokens):
        assert not responses.keys() & step.finished.keys()
        responses |= step.finished
    return [responses[index] for index in range(len(prompts))]
