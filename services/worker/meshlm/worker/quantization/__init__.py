"""Weights quantized while they are loaded: which format each matrix gets, and how good that is, measured."""
