"""The kernels on a GPU: the stages of ``python -m benchmarks.gpu_check``, the suite's rows."""
