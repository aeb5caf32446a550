"""What the field's reference library computes, vector by vector.

Every vector agrees, or stands in differences.py with a reason, or in later.txt because its layer or quantizer isn't
here yet. A vector in one of the lists that agrees after all fails too, so that the lists stay true.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tool"))
import compare  # noqa: E402
from adapter import Backend, MissingName  # noqa: E402
from run_cases import Run, load_arrays  # noqa: E402

sys.path.insert(0, str(HERE))
from differences import DIFFERENCES  # noqa: E402

CASES = {c["name"]: c for c in json.loads((HERE / "cases_dev.json").read_text())}
LATER = set((HERE / "later.txt").read_text().split())
REFERENCE = compare.read(HERE / "golden_dev.npz")
ARRAYS = load_arrays([HERE / "golden_dev.npz"])
BACKEND = Backend("qframework")


def verdict(name: str) -> str | None:
    """None when the vector agrees, else what differs."""
    case, reference = CASES[name], REFERENCE[name]
    deterministic = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            out, meta = Run(json.loads(json.dumps(case)), ARRAYS[name], BACKEND).go(MissingName)
        finally:
            torch.use_deterministic_algorithms(deterministic)
    if reference["meta"]["status"] == "error":
        return compare.error_match(case, reference["meta"], meta)
    if meta["status"] != "ok":
        return f"{meta['status']}: {meta.get('error', '')} {meta.get('message', '')}"
    found = compare.Verdict()
    found.slack = case.get("slack", 1.0)
    for key, kind in reference["meta"]["kinds"].items():
        if meta["kinds"].get(key) != kind and not ("ref_nodes" in case and "." in key):
            found.why.append(f"{key}: {kind} expected, {meta['kinds'].get(key)} returned")
    expected = reference["out"]
    if "ref_nodes" in case:
        expected = {k: a for k, a in expected.items() if k.startswith(("train", "eval", "grad"))}
    got = {k.removeprefix("out/"): np.asarray(v) for k, v in out.items()}
    compare.compare_arrays(expected, got, case["phase"], found, strict=False)
    return "; ".join(found.why) or None


def test_every_vector_is_accounted_for() -> None:
    assert CASES.keys() == REFERENCE.keys()
    assert CASES.keys() >= LATER | DIFFERENCES.keys()
    assert not LATER & DIFFERENCES.keys()


@pytest.mark.parametrize("name", sorted(CASES))
def test_vector_agrees(name: str) -> None:
    why = verdict(name)
    if name in LATER:
        assert why is not None, "this vector agrees now: take it off later.txt"
    elif name in DIFFERENCES:
        assert why is not None, "this vector agrees now: take it off differences.py"
    else:
        assert why is None
