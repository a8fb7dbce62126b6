"""torch's own module inputs and error inputs for LSTM and LSTMCell, run against our classes.

What torch's test_modules.py does with them, too: representation, pickle, saved and moved modules,
strided tensors, numeric derivatives.
In a process of its own: importing torch's test utilities changes global flags and the hypothesis
profile. They ask for the package expecttest, of which nothing is used here.
"""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import copy, io, json, pickle, re, sys, types, unittest, warnings
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase, ACCEPT=0))
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like
from torch.utils._pytree import tree_leaves, tree_map
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


def handling(case, info, cls, sample):
    mine, theirs = build(cls, sample, torch.float64), build(info.module_cls, sample, torch.float64)
    given = sample.forward_input
    expected = tree_leaves(run(mine, sample))

    def answers(module):
        return all(map(torch.equal, tree_leaves(run(module, sample)), expected))

    check((*case, "repr"), repr(mine) == f"fastlstm.{theirs!r}")
    check((*case, "deepcopy"), answers(copy.deepcopy(mine)))
    check((*case, "pickle"), answers(pickle.loads(pickle.dumps(mine))))
    saved = io.BytesIO()
    torch.save(mine, saved)
    saved.seek(0)
    check((*case, "save"), answers(torch.load(saved, weights_only=False)))
    empty = build(cls, sample, torch.float64).to("meta").to_empty(device="cpu")
    empty.load_state_dict(mine.state_dict())
    check((*case, "to_empty"), answers(empty))
    check((*case, "there and back"), answers(copy.deepcopy(mine).to("cpu").double().share_memory()))
    for dtype in (torch.float32, torch.bfloat16):
        same = {name: p.dtype for name, p in copy.deepcopy(theirs).to(dtype).named_parameters()}
        found = {name: p.dtype for name, p in copy.deepcopy(mine).to(dtype).named_parameters()}
        check((*case, "to", dtype), found == same)
    meta = cls(*sample.constructor_input.args, **{**sample.constructor_input.kwargs,
               "device": "meta", "dtype": torch.float16})
    check((*case, "factory"), {(p.device.type, p.dtype) for p in meta.parameters()}
          == {("meta", torch.float16)})

    # Strided input, states and weights; then their gradients, by torch's own checks.
    strided = copy.deepcopy(mine)
    with torch.no_grad():
        for name, p in mine.named_parameters():
            setattr(strided, name, nn.Parameter(noncontiguous_like(p)))
    args, kwargs = tree_map(lambda x: noncontiguous_like(x) if torch.is_tensor(x) else x,
                            (given.args, given.kwargs))
    check((*case, "strided"), all(map(close, tree_leaves(strided(*args, **kwargs)), expected)))

    leaves = [x for x in tree_leaves((given.args, given.kwargs)) if torch.is_tensor(x)]
    names = [name for name, _ in mine.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in mine.parameters()]

    def function(*flat):
        left = iter(flat[:len(leaves)])
        args, kwargs = tree_map(lambda x: next(left) if torch.is_tensor(x) else x,
                                (given.args, given.kwargs))
        own = dict(zip(names, flat[len(leaves):]))
        return tuple(tree_leaves(torch.func.functional_call(mine, own, args, kwargs)))

    fast = dict(fast_mode=True, check_batched_grad=True)
    for name, derive in (("grad", gradcheck), ("gradgrad", gradgradcheck)):
        if name == "gradgrad" and case[2] % 4:  # a second each
            continue
        try:
            check((*case, name), derive(function, [*leaves, *weights], **fast))
        except Exception as error:
            check((*case, name, repr(error)[:300]), False)


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
                if dtype == torch.float64 and not training:
                    handling((name, "handling", i), info, cls, sample)
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


@pytest.mark.parametrize("kind", ["inputs", "errors", "handling"])
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_torchs_own_material(suite, name, kind):
    assert suite["counts"].get(f"{name} {kind}", 0) >= 8
    assert [f for f in suite["failures"] if f.startswith(f"{name} {kind}")] == []
