"""Budgets fit into free memory, and are halved when memory runs out."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mllm_msr.core import devices
from mllm_msr.core.devices import max_forward_tokens
from mllm_msr.core.errors import is_out_of_memory
from mllm_msr.engines import budgets
from mllm_msr.engines.budgets import Budget, cache_bytes, forward_bytes
from mllm_msr.engines.decoding import SLOTS, Decoder
from mllm_msr.engines.local import LocalModel
from mllm_msr.engines.packing import Packer
from mllm_msr.engines.prompt import Prompt

CPU = torch.device("cpu")
# Llama-3-8B's shapes.
LLAMA = SimpleNamespace(
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
)


def test_the_cache_token_bytes_has_the_size_known_of_llama_3() -> None:
    # 2 x 32 layers x 8 heads x 128 numbers of 2 bytes: 128 KiB.
    assert cache_bytes(LLAMA, torch.bfloat16) == 128 * 1024  # type: ignore[arg-type]
    assert cache_bytes(LLAMA, torch.float32) == 256 * 1024  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fitting", "tokens"), [(0, 1), (300, 300), (10**6, max_forward_tokens(CPU))]
)
def test_tokens_fit_into_a_quarter_of_the_free_memory_and_the_device(
    llava: LocalModel, monkeypatch: pytest.MonkeyPatch, fitting: int, tokens: int
) -> None:
    text = llava.encoder.config.get_text_config()
    wide = 6 * text.hidden_size + 3 * text.intermediate_size
    token_bytes = cache_bytes(text, torch.float32) + 4 * wide + text.vocab_size * 8 // 16
    assert forward_bytes(text, torch.float32) == token_bytes
    monkeypatch.setattr(budgets, "free_memory", lambda _: 4 * token_bytes * fitting)
    assert Budget(llava.encoder.config, torch.float32, CPU).tokens == tokens


def test_memory_allocated_later_does_not_change_the_budget(
    llava: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(llava.encoder.config, torch.float32, CPU)
    before = budget.tokens
    monkeypatch.setattr(budgets, "free_memory", lambda _: 0)
    assert budget.tokens == before


def test_a_halved_budget_halves_batches_and_slots(llava: LocalModel) -> None:
    budget = Budget(llava.encoder.config, torch.float32, CPU)
    packer = Packer(llava.encoder, llava.weights, budget)
    decoder = Decoder(llava.encoder, llava.weights, budget)
    prompts = [Prompt(f"{number} red cats") for number in range(200)]

    def largest(batches: Iterable[list[int]]) -> int:
        packed = (packer.pack([prompts[index] for index in batch]) for batch in batches)
        return max(batch.inputs["input_ids"].numel() for batch in packed)

    def measure() -> int:
        batch = largest(packer.batches(prompts))
        assert batch <= budget.tokens
        return batch

    whole = measure()
    assert budget.tokens == max_forward_tokens(CPU)
    assert decoder._count_slots(slot_tokens=10) == SLOTS
    budget.halve()
    assert budget.tokens == max_forward_tokens(CPU) // 2
    assert decoder._count_slots(slot_tokens=10) == SLOTS // 2
    assert measure() < whole
    for _ in range(20):
        budget.halve()
    assert budget.tokens == decoder._count_slots(slot_tokens=10) == 1


def test_a_shared_prefix_is_computed_again_where_memory_is_short(
    llava: LocalModel,
) -> None:
    budget = Budget(llava.encoder.config, torch.float32, CPU)
    packer = Packer(llava.encoder, llava.weights, budget)
    prompts = [Prompt("a long story of red cats " * 8 + str(number)) for number in range(64)]

    def most_together() -> int:
        rows = packer.plan(prompts)
        assert all(row.tokens <= budget.row_tokens or len(row.prompts) == 1 for row in rows)
        return max(len(row.prompts) for row in rows)

    whole, longest = most_together(), max(row.tokens for row in packer.plan(prompts))
    while budget.row_tokens >= longest:
        budget.halve()
    assert 1 <= most_together() < whole
    for _ in range(40):
        budget.halve()
    assert most_together() == 1


def test_free_memory_of_a_container_counts_its_file_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = devices.free_memory(CPU)
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    assert devices.free_memory(CPU) == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7000000\n")
    (tmp_path / "memory.stat").write_text("anon 4000000\ninactive_file 3000000\n")
    assert devices.free_memory(CPU) == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("8000000\n")
    assert devices.free_memory(CPU) == 4_000_000


def test_running_out_of_memory_on_a_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55, dtype=torch.uint8)  # 32 pebibytes
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
    ],
    ids=["CUDA", "MPS", "Windows", "Python", "cuBLAS", "another error", "not torch's"],
)
def test_out_of_memory_errors_are_recognised(error: Exception, is_so: bool) -> None:
    assert is_out_of_memory(error) is is_so
