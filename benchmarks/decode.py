"""A whole decode step of an 8B model on a GPU: every layer, head and draw, replayed as one CUDA graph, beside the time
that reading its weights and cache takes, and beside transformers with a static cache under torch.compile.

Weights are random at the shapes of Llama 3 8B: speed does not depend on their values. Needs torch and Triton and, for
the peer, transformers; none of the services' packages. Where there is no CUDA device it says so and ends.
"""

from __future__ import annotations

import sys

import torch
from harness import ROOT, option_parser, report

sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "services/worker")]  # a GPU machine has no package, but these


def main() -> None:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--no-peer", action="store_true", help="without transformers, which compiles for minutes")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: no CUDA device")
        return
    from decode_step import rows_on

    device = torch.device("cuda")
    rows = rows_on(device, 3 if chosen.quick else 7, peer=not (chosen.no_peer or chosen.quick))
    report("decode", rows, chosen.json, gpu=torch.cuda.get_device_name(device))


if __name__ == "__main__":
    main()
