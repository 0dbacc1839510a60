"""The torch dequantiser: packed blocks to float32, for every format of `formats.FORMATS`.

The entry point is `dequantize.dequantize_into`; each family of formats has a file. Results equal those of
`reference/` exactly.
"""
