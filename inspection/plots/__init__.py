"""Figures for print: each function makes one, of data that was read and checked."""
