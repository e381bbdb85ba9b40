"""What is done with a stored kernel: functions of kernels and arrays, without torch."""
