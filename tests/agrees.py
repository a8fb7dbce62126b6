"""Whether an installed fastlstm agrees with nn.LSTM, forward and backward: prints what it ran."""

import torch

import fastlstm

torch.manual_seed(0)
theirs = torch.nn.LSTM(5, 7, 2, bidirectional=True)
ours = fastlstm.from_torch(torch.nn.Sequential(theirs))[0]
x = torch.randn(9, 3, 5, requires_grad=True)
outputs = [module(x)[0] for module in (theirs, ours)]
torch.testing.assert_close(*outputs)
torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in outputs))
print(f"fastlstm agrees with nn.LSTM beside torch {torch.__version__}: {fastlstm.__file__}")
