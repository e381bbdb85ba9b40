"""How two kernels of the same samples differ."""
