"""Optimizers, epochs and run folders: one function per stage, each readable as its algorithm."""
