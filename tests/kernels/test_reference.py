"""Gradients of a load, added up by hand, are those that PyTorch's autograd gives."""

import pytest
import torch

from flashfuse.kernels.expr import variables, walk
from flashfuse.kernels.reference import add_to_load, environment, evaluate
from flashfuse.kernels.spec import ScoreProgram

SIZES = (2, 3, 5, 7)


@pytest.mark.parametrize(
    ("load", "table", "index", "low"),
    [
        ("t[where(i[q, kv] < 0, i[q, kv] + 9, i[q, kv]), h]", (9, 3), (5, 7), -9),
        ("t[h, abs(kv - q)]", (3, 7), (1,), 0),
        ("t[i[b, kv], h]", (9, 3), (2, 7), 0),
        ("t[kv - q]", (7,), (1,), 0),
        ("t[0]", (2,), (1,), 0),
    ],
)
def test_gradients_of_a_load(load, table, index, low):
    program = ScoreProgram.parse(f"s + {load} where kv >= q else nan")
    captures = {"t": torch.randn(table, requires_grad=True), "i": torch.randint(low, 9, index)}
    captures = [captures[name] for name in program.captures]
    (node,) = (n for n in walk(program.score) if n.op == "load" and n.args[0] == "t")
    env = environment(program, captures, [], SIZES, "cpu", variables(node))
    gradient = torch.randn(SIZES) * (torch.arange(7) >= torch.arange(5)[:, None])
    evaluate(node, env).expand(SIZES).backward(gradient)
    total = torch.zeros(table)
    add_to_load(total, node, env, gradient)
    torch.testing.assert_close(total, captures[program.captures.index("t")].grad)
