"""A dry run's engine: it counts prompts and computes nothing."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm

from mllm_msr.core.errors import DataError
from mllm_msr.engines.encoding import Encoder
from mllm_msr.engines.prompt import Prompt
from mllm_msr.method.inference.cached import Conversation, converse_in_rounds


class CountingEngine:
    """Counts prompts instead of computing responses, for dry runs.

    Stored responses are used, so that the prompts that depend on them are the real ones. A response
    that is not stored is replaced by a placeholder.

    Attributes:
        encoder: The model's encoder.
        limit: The most tokens of a prompt.
        first_prompt: The first prompt; None before it.
        calls: How many prompts a run puts to the model or finds in the store.
    """

    def __init__(
        self,
        encoder: Encoder,
        limit: int,
        find_stored: Callable[[Sequence[Prompt]], Sequence[str | None]] | None = None,
        placeholder: str = "",
    ) -> None:
        """Take a model's encoder.

        Args:
            encoder: The model's encoder.
            limit: The most tokens of a prompt.
            find_stored: Returns stored responses, such as :meth:`CachedEngine.find_stored`; None
                where no prompt depends on a response.
            placeholder: The response to every other prompt.
        """
        self.encoder, self.limit = encoder, limit
        self.first_prompt: Prompt | None = None
        self.calls = 0
        self._find_stored, self._placeholder = find_stored, placeholder

    def respond(self, prompts: Sequence[Prompt], progress: "tqdm[Any]") -> list[str]:
        """Count prompts; return stored responses and placeholders."""
        if prompts and self.first_prompt is None:
            self.first_prompt = prompts[0]
        self.calls += len(prompts)
        stored = self._find_stored(prompts) if self._find_stored else [None] * len(prompts)
        progress.update(len(prompts))
        return [self._placeholder if text is None else text for text in stored]

    def converse(self, conversations: Iterable[Conversation], progress: "tqdm[Any]") -> None:
        """Count the prompts of conversations, as :meth:`respond` does."""
        converse_in_rounds(self.respond, conversations, progress)

    def plan(self) -> tuple[str, int]:
        """Return the first prompt as the model gets it, and the number of calls.

        Raises:
            DataError: There was no prompt.
        """
        if self.first_prompt is None:
            fix = "check the tables and settings of the stage"
            raise DataError(
                expected="prompts for the model", got="none", where=self.encoder.name, fix=fix
            )
        return self.encoder.render(self.first_prompt), self.calls
