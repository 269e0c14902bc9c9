"""Whole decode steps of Llama 3 8B with random weights, and transformers' on the same shapes: see `decode.py`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import Row, median, spread

from meshlm.kernels.gpu.kv_cache import KvFormat, allocate_kv_layer, bytes_per_token
from meshlm.kernels.gpu.matrix import Matrix, QuantizedMatrix, padded_cols
from meshlm.kernels.gpu.sample import sample
from meshlm.kernels.rope import rope_frequencies
from meshlm.kernels.sample import SampleRows
from meshlm.worker.engine.gpu_graphs import DecodeGraphs
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, DecoderLayer, Mlp, Projection, Rope
from meshlm.worker.models.gpu_decoder import GpuBatch, GpuDecoder

CONTEXT = 1024  # tokens of each sequence
BLOCK = 64  # as serving has it on a GPU
NEW = 128  # tokens that the peer generates
LLAMA_8B = ModelConfig(
    architecture="llama", vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, layers=32, heads=32,
    kv_heads=8, head_dim=128, norm_eps=1e-5, rope_theta=500_000.0, max_context=8192, tied_head=False,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    weights: str  # bf16 or int4
    batch: int

    @property
    def name(self) -> str:
        return f"decode_{self.weights}_b{self.batch}"


def random_matrix(weights: str, rows: int, cols: int, device: torch.device, dtype: torch.dtype) -> Matrix:
    """Values such as a trained model's; int4 with a minimum in groups of 128, as AWQ files have them."""
    if weights == "bf16":
        return torch.empty(rows, cols, dtype=dtype, device=device).normal_(0, 0.02)
    padded = padded_cols(cols)
    groups = -(-padded // 128)
    codes = torch.randint(0, 256, (rows, padded // 2), dtype=torch.uint8, device=device)
    scales = torch.full((groups, rows), 0.004, dtype=torch.float16, device=device)
    return QuantizedMatrix("int4", codes, scales, scales * -7.5, 128, cols)


def random_decoder(config: ModelConfig, weights: str, device: torch.device, dtype: torch.dtype) -> Decoder[Matrix]:
    """Embedding and head stay dense: quantized 8B checkpoints leave them so."""

    def projection(rows: int, cols: int) -> Projection[Matrix]:
        return Projection(random_matrix(weights, rows, cols, device, dtype))

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, device=device)

    width, middle = config.hidden_size, config.intermediate_size
    layers = tuple(
        DecoderLayer(
            attention_norm=ones(width),
            query=projection(config.query_size, width),
            key=projection(config.kv_size, width),
            value=projection(config.kv_size, width),
            output=projection(width, config.query_size),
            mlp_norm=ones(width),
            mlp=Mlp(projection(middle, width), projection(middle, width), projection(width, middle)),
        )
        for _ in range(config.layers)
    )
    table = [random_matrix("bf16", config.vocab_size, width, device, dtype) for _ in range(2)]
    rope = Rope(rope_frequencies(config.head_dim, config.rope_theta))
    return Decoder(
        config, table[0], layers, ones(width), table[1], (rope,), attention_scale=config.head_dim**-0.5
    )  # fmt: skip


class Step:
    """A decode step of one batch size over a filled cache, captured where there is a CUDA device."""

    def __init__(self, model: GpuDecoder, batch: int, context: int, kv_format: KvFormat) -> None:
        config, device = model.config, model.device
        blocks = -(-(context + 1) // BLOCK)
        self._model = model
        self._cache = [
            allocate_kv_layer(kv_format, batch * blocks, config.kv_heads, BLOCK, config.head_dim, device)
            for _ in range(config.layers)
        ]
        for layer in self._cache:
            for part in (layer.keys, layer.values):
                part.view(torch.uint8).random_(0, 60)  # small numbers in any format
        # As wide as serving has them, for the longest context: by the width contexts are split.
        tables = torch.zeros(batch, -(-config.max_context // BLOCK), dtype=torch.int32, device=device)
        tables[:, :blocks] = torch.randperm(batch * blocks, device=device).view(batch, blocks)
        full = torch.full((batch,), context, dtype=torch.int32, device=device)
        slots = tables[:, context // BLOCK] * BLOCK + context % BLOCK
        tokens = torch.arange(batch, dtype=torch.int32, device=device)
        starts = torch.zeros(1, dtype=torch.int32, device=device)
        self._batch = GpuBatch(tokens, full, slots, tables, full + 1, starts, batch, 0)
        self._rows = SampleRows(
            temperature=torch.zeros(batch, device=device),
            top_k=torch.zeros(batch, dtype=torch.int32, device=device),
            top_p=torch.ones(batch, device=device),
            min_p=torch.zeros(batch, device=device),
            uniform=torch.zeros(batch, dtype=torch.float64, device=device),
        )
        self.drawn = (torch.empty(batch, dtype=torch.int32, device=device), torch.empty(batch, device=device))
        self._graphs = DecodeGraphs(self._run, batch, device)
        self._size = batch

    def capture(self) -> None:
        self._graphs.capture(lambda done, total: None, only=self._size)

    @torch.inference_mode()
    def __call__(self) -> None:
        self._graphs.run(self._size)

    @torch.inference_mode()
    def _run(self, size: int) -> None:
        logits = self._model.logits(self._model.residual(self._batch, self._cache))
        sample(logits, self._rows, out=self.drawn)


def seconds(run: Callable[[], object], repeats: int, runs: int) -> list[float]:
    """Of one call, by the device's clock, the mean of `repeats`; `runs` times."""
    out = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        out.append(begin.elapsed_time(end) / 1e3 / repeats)
    return out


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a device-to-device copy: the best of several."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * len(source) / min(seconds(lambda: target.copy_(source), 4, 5))


def measure(case: Case, model: GpuDecoder, bandwidth: float, runs: int) -> tuple[Row, float]:
    """The step's tokens a second beside its limit; and its seconds."""
    step = Step(model, case.batch, CONTEXT, "bfloat16")
    step.capture()
    taken = seconds(step, 20, runs)
    config = model.config
    read = model.weight_bytes - config.vocab_size * config.hidden_size * 2  # of the embedding a few rows are read
    read += case.batch * CONTEXT * config.layers * bytes_per_token("bfloat16", config.kv_heads, config.head_dim)
    limit = read / bandwidth
    goal = "0.80 of the limit" if case.batch == 1 else ""
    row = Row(
        f"{case.name}_ms", "ms", 1e3 * median(taken), runs, spread(taken), "reading weights and cache", 1e3 * limit,
        limit / median(taken), 1e3 * limit, goal,
    )  # fmt: skip
    return row, median(taken)


def transformers_seconds(batch: int, device: torch.device) -> float:
    """Of a token, with a static cache and torch.compile: a long answer less a short one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = LLAMA_8B
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.max_context, rope_theta=c.rope_theta, tie_word_embeddings=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, c.vocab_size, (batch, CONTEXT - NEW), device=device)

    def generate(new: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
                cache_implementation="static",
            )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    for new in (NEW, 2):  # compiles
        generate(new)
    return median([(generate(NEW) - generate(2)) / (NEW - 2) for _ in range(3)])


def forget() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def rows_on(device: torch.device, runs: int, *, peer: bool) -> list[Row]:
    bandwidth = copy_bandwidth(device)
    rows: list[Row] = []
    bf16: dict[int, float] = {}
    for weights in ("bf16", "int4"):
        model: Any = GpuDecoder(random_decoder(LLAMA_8B, weights, device, torch.bfloat16), torch.bfloat16, device)
        for batch in (1, 8, 32):
            row, taken = measure(Case(weights, batch), model, bandwidth, runs)
            rows.append(row)
            if weights == "bf16":
                bf16[batch] = taken
        del model
        forget()
    for batch, goal in ((1, "1.5x"), (32, "3x")) if peer else ():
        try:
            theirs = transformers_seconds(batch, device)
        except Exception as error:  # a peer that is absent, or fails: what was measured is reported all the same
            print(f"transformers at batch {batch}: not measured: {type(error).__name__}: {error}", flush=True)
            continue
        finally:
            forget()
        rows.append(
            Row(
                f"decode_bf16_b{batch}_tok_s",
                "tok/s",
                batch / bf16[batch],
                runs,
                0.0,
                "transformers, static cache, compiled",
                batch / theirs,
                theirs / bf16[batch],
                goal=goal,
            )
        )
    return rows
