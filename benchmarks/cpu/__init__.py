"""The CPU kernels against nn.LSTM, ONNX Runtime and others: speed, memory, sampling, training."""
