"""The torch dequantiser: packed blocks to float32, for every format of `formats.FORMATS`.

One door, `dequantize.dequantize_into`; one file a family behind it. Exact against `reference/`.
"""
