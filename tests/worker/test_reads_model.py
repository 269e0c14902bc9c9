"""Scores and vectors of a real model, against transformers' forward pass over the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from tests.worker.workers import running

# Two loads of the model, one of them by a dequantizer in plain Python.
pytestmark = [pytest.mark.mesh, pytest.mark.model, pytest.mark.oracle, pytest.mark.timeout(600)]

TEXT = "The capital of France is Paris, and the capital of Italy is Rome."


async def test_scores_and_vectors_are_those_of_transformers(smollm2_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    async with running(engine="torch", model_path=smollm2_path, kv_blocks=64) as worker:
        source = pb.Input(prompt=TEXT)
        scored: Any = await worker.stub.Score(worker_pb2.ScoreRequest(input=source, return_text_offsets=True))
        embedded: Any = await worker.stub.Embed(worker_pb2.EmbedRequest(inputs=[source], normalize=False))
    (first,) = scored.scored
    assert TEXT.endswith(first.text)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(smollm2_path.parent), gguf_file=smollm2_path.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(smollm2_path.parent), gguf_file=smollm2_path.name)
    ids = torch.tensor([tokenizer.encode(TEXT, add_special_tokens=False)])
    with torch.no_grad():
        made = model(ids, output_hidden_states=True)
    logprobs = made.logits[0, :-1].log_softmax(-1)
    wanted = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    assert list(first.token_ids) == ids[0, 1:].tolist()
    torch.testing.assert_close(torch.tensor(list(first.logprobs)), wanted, atol=0.02, rtol=0.02)
    torch.testing.assert_close(torch.tensor(list(first.entropies)), entropies, atol=0.02, rtol=0.02)
    vector = torch.tensor(list(embedded.embeddings[0].vector))
    assert torch.cosine_similarity(vector, made.hidden_states[-1][0].mean(0), dim=0) > 0.9999
