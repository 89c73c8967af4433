"""Pure tensor maths: grouping, ranges, rounding, search, bit packing. No modules, devices or files here."""
