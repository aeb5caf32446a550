import subprocess
import sys

HEAVY = [
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "torch.distributed",
    "matplotlib",
    "sympy",
    "sklearn",
    "rich",
]

SCRIPT = f"""
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import qframework.layers, qframework.quantizers
spent = time.perf_counter() - start
new = set(sys.modules) - before
print(spent)
print(sorted(m for m in {HEAVY!r} if m in new))
print(len([m for m in new if m.startswith("qframework")]), len(new))
"""


def test_importing_loads_nothing_heavy() -> None:
    """The budget is 0.4 s beyond torch; what is counted here is the modules that it would go to."""
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    spent, heavy, counts = out.stdout.splitlines()
    print(f"{float(spent):.3f} s, {counts} modules")
    assert heavy == "[]"
    assert int(counts.split()[1]) < 400
