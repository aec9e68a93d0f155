"""An engine that records what it is asked, for tests of the method's steps."""

from collections.abc import Sequence

from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.prompt import Prompt
from mllm_msr.engines.response_store import Response, ResponseStore
from mllm_msr.method.inference import CachedEngine, in_one_step


class Recorder:
    """An engine that records prompts and responds with a word and their number."""

    def __init__(
        self, model: LocalModel, store: ResponseStore, word: str, limit: int = 4_000
    ) -> None:
        self.prompts: list[Prompt] = []
        self._word = word
        self.engine = CachedEngine(
            model, store, limit, model.batches, in_one_step(self._respond), decoding="recorded"
        )

    def _respond(self, batch: Sequence[Prompt]) -> list[Response]:
        self.prompts += batch
        start = len(self.prompts) - len(batch)
        return [Response(f"{self._word}{start + n}", complete=True) for n in range(len(batch))]
