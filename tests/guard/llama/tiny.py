"""A Llama with random weights as a Hugging Face folder, with what a folder of Llama Guard 3 has: a byte-level tokenizer
with Llama 3's control tokens, and a chat template that asks for verdicts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from meshlm.guard.llama.prompts import VERSIONS

CONTROL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# As Llama 3 cuts text before it is encoded.
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def make(folder: Path) -> Any:
    """Write the folder. Its tokenizer, as transformers reads it, and its model."""
    backend = _trained()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=CONTROL[0], eos_token=CONTROL[3], chat_template=_template()
    )
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        tie_word_embeddings=True,
        bos_token_id=backend.token_to_id(CONTROL[0]),
        eos_token_id=backend.token_to_id(CONTROL[3]),
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(str(folder)), model


def _trained() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(tokenizers.Regex(_CUT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    asked = [version.prompt(version.categories, [("User", "hello")]).text for version in VERSIONS.values()]
    texts = [text for prompt in asked for text in _between_control_tokens(prompt)]
    backend.train_from_iterator([*texts, "safe\n", "unsafe\nS1,S2"], trainer)
    bos = CONTROL[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


def _between_control_tokens(text: str) -> list[str]:
    for control in CONTROL:
        text = text.replace(control, "\0")
    return text.split("\0")


def _template() -> str:
    """Llama Guard 3's question, in Jinja: the wording is that of the version's snapshot, cut where turns go."""
    asked = {role: Path(__file__).parent / "prompts" / f"llama-guard-3-{role}.txt" for role in ("user", "agent")}
    before, after = {}, {}
    for role, path in asked.items():
        text = path.read_text("utf-8").removesuffix("\n\n")
        before[role], rest = text.split("User: ", 1)
        after[role] = "<END CONVERSATION>" + rest.split("<END CONVERSATION>", 1)[1]
    turns = (
        "{%- for message in messages %}{{ {'user': 'User', 'assistant': 'Agent'}[message.role] ~ ': ' ~ "
        "(message.content | trim) ~ '\\n\\n' }}{% endfor %}"
    )
    one, other = (
        "{{ " + repr(before[role]) + " }}" + turns + "{{ " + repr(after[role]) + " }}" for role in ("user", "agent")
    )
    return "{% if messages[-1].role == 'user' %}" + one + "{% else %}" + other + "{% endif %}"


def probability(model: Any, ids: list[int], safe: int, unsafe: int) -> float:
    """Of `unsafe` against `safe` as the next token, by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return float(torch.softmax(logits[[safe, unsafe]], -1)[1])


def constrained(model: Any, ids: list[int], verdicts: list[list[int]]) -> list[int]:
    """Greedy decoding where only `verdicts`, each with its end, may come out: by trying them all."""
    said: list[int] = []
    while True:
        allowed = {verdict[len(said)] for verdict in verdicts if verdict[: len(said)] == said and verdict != said}
        if not allowed:
            return said
        with torch.no_grad():
            logits = model(torch.tensor([ids + said])).logits[0, -1]
        said.append(max(allowed, key=lambda token: float(logits[token])))
