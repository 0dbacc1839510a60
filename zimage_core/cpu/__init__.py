"""The torch dequantiser: packed blocks to float32, for every format of `formats.FORMATS`.

Others call `dequantize.dequantize_into`; each family of formats has a file. Exact against `reference/`.
"""
