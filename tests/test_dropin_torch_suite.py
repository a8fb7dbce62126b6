"""torch's own module inputs and error inputs for LSTM and LSTMCell, run against our classes.

In a process of its own: importing torch's test utilities changes global flags and the hypothesis
profile. They ask for the package expecttest, of which nothing is used here.
"""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, re, sys, types, unittest, warnings
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase, ACCEPT=0))
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves
import fastlstm

warnings.simplefilter("ignore")
torch.manual_seed(0)
ours = {nn.LSTM: fastlstm.LSTM, nn.LSTMCell: fastlstm.LSTMCell}
counts, failures = {}, []


def check(case, condition):
    counts[case[:2]] = counts.get(case[:2], 0) + 1
    if not condition:
        failures.append(" ".join(map(str, case)))


def close(a, b):
    wide = a.dtype == torch.float64
    return a.shape == b.shape and torch.allclose(a, b, *((1e-8, 1e-10) if wide else (1e-4, 1e-5)))


def build(cls, sample, dtype):
    made = sample.constructor_input
    return cls(*made.args, **{"device": "cpu", "dtype": dtype, **made.kwargs})


def run(module, sample):
    given = sample.forward_input
    return module(*given.args, **given.kwargs)


for info in module_db:
    cls = ours.get(info.module_cls)
    if cls is None:
        continue
    name = cls.__name__
    for dtype in (torch.float32, torch.float64):
        for training in (False, True):
            arguments = dict(device="cpu", dtype=dtype, requires_grad=True, training=training)
            for i, sample in enumerate(info.module_inputs_func(info, **arguments)):
                case = (name, "inputs", i, dtype, training)
                theirs = build(info.module_cls, sample, dtype).train(training)
                mine = build(cls, sample, dtype).train(training)
                mine.load_state_dict(theirs.state_dict())
                results, grads = [], []
                for module in (theirs, mine):
                    results.append(tree_leaves(run(module, sample)))
                    leaves = [x for x in tree_leaves(sample.forward_input.args) if
                              isinstance(x, torch.Tensor) and x.requires_grad]
                    leaves += list(module.parameters())
                    grads.append(torch.autograd.grad(sum(y.sum() for y in results[-1]), leaves))
                check(case, all(map(close, [*results[0], *grads[0]], [*results[1], *grads[1]])))
                if sample.reference_fn is not None:
                    given = sample.forward_input
                    expected = sample.reference_fn(mine, *given.args, **given.kwargs)
                    same = all(map(close, results[1], tree_leaves(expected)))
                    check((*case, "reference"), same)
            if info.module_error_inputs_func is None:
                continue
            for i, bad in enumerate(info.module_error_inputs_func(info, **arguments)):
                case = (name, "errors", i, dtype, training)
                sample = bad.module_error_input
                try:
                    run(build(cls, sample, dtype), sample)
                except Exception as error:
                    matches = re.search(bad.error_regex, str(error)) is not None
                    check((*case, repr(error)), type(error) is bad.error_type and matches)
                else:
                    check((*case, "no error"), False)
print(json.dumps({"counts": {" ".join(k): n for k, n in counts.items()}, "failures": failures}))
"""


@pytest.fixture(scope="module")
def suite():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "kind", ["LSTM inputs", "LSTM errors", "LSTMCell inputs", "LSTMCell errors"]
)
def test_torchs_own_material(suite, kind):
    assert suite["counts"].get(kind, 0) >= 8
    assert [f for f in suite["failures"] if f.startswith(kind)] == []
