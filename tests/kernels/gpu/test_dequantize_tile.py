"""The assembly that makes floats of 4-bit codes on a GPU, run here by hand: the interpreter takes another path."""

from __future__ import annotations

import re

import pytest
import torch

from meshlm.kernels.gpu.dequantize_tile import SIGNED, UNSIGNED

WORD = 0xFFFFFFFF


def bfloats(word: int) -> list[float]:
    halves = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16)
    return [float(half) for half in halves.view(torch.bfloat16)]


def word_of(values: list[float]) -> int:
    low, high = torch.tensor(values, dtype=torch.bfloat16).view(torch.uint16).tolist()
    return int(low) | int(high) << 16


def run(assembly: str, word: int) -> list[float]:
    """What the assembly writes to $0 to $3, of the word in $4, by the PTX manual: two bfloat16 a register."""
    registers = {"$4": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in re.findall(r"^\w+\.\S+ .*?;", assembly, re.MULTILINE):
        operation, rest = line.rstrip(";").split(" ", 1)
        target, *operands = [part.strip() for part in rest.split(",")]
        a, b, c, d = ([value(name) for name in operands] + [0] * 4)[:4]
        match operation:
            case "mov.b32":
                registers[target] = a
            case "prmt.b32":
                taken = (a | b << 32).to_bytes(8, "little")
                registers[target] = int.from_bytes(bytes(taken[c >> 4 * i & 7] for i in range(4)), "little")
            case "shr.b32":
                registers[target] = a >> b
            case "lop3.b32":
                bits = (d >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32))
                registers[target] = sum(bit << i for i, bit in enumerate(bits)) & WORD
            case "fma.rn.bf16x2":
                parts = zip(bfloats(a), bfloats(b), bfloats(c), strict=True)
                registers[target] = word_of([x * y + z for x, y, z in parts])
            case _:
                raise AssertionError(line)
    return [value for register in ("$0", "$1", "$2", "$3") for value in bfloats(registers[register])]


@pytest.mark.parametrize(("assembly", "zero"), [(SIGNED.value, 8), (UNSIGNED.value, 0)])
def test_the_assembly_takes_every_code_to_its_value(assembly: str, zero: int) -> None:
    for byte in range(256):
        taken = [byte, byte ^ 0xFF, (byte * 7 + 3) & 0xFF, (byte * 5 + 1) & 0xFF]
        word = int.from_bytes(bytes(taken), "little")
        expected = [(one & 15) - zero for one in taken] + [(one >> 4) - zero for one in taken]
        assert run(assembly, word) == expected
