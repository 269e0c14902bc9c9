"""The rows of a table: token ids to vectors."""

from __future__ import annotations

import torch


def reference_embedding(tokens: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """tokens: (rows,) of an integer type; table: (vocab, width). Returns (rows, width) float64; a token that the table
    does not have is zeros."""
    out = torch.zeros(len(tokens), table.shape[1], dtype=torch.float64)
    for row, token in enumerate(tokens.tolist()):
        if 0 <= token < len(table):
            out[row] = table[token].double().cpu() * scale
    return out.to(table.device)
