"""Every op inside a forked DataLoader worker and inside os.fork, after the parent has used its own threads."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, signal
import torch
from fastmoe import testing
from tests.ops.battery import Battery
from tests.ops import test_adafactor, test_adamw, test_experts, test_gating, test_gemm, test_loss, test_norm
from tests.ops import test_permutation

cases = [case for cls in Battery.__subclasses__() for case in cls.cases if case.thorough or case.parallel]
signal.alarm(100)  # a hang is a failure, not a wait

class Results(torch.utils.data.Dataset):
    def __len__(self):
        return len(cases)

    def __getitem__(self, i):
        results = testing.forward_backward(cases[i].call, inputs[i], cases[i].frozen)
        flat = {name: tensor.detach().contiguous().view(-1) for name, tensor in results.items()}
        return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in flat.items()}

torch.set_num_threads(2)
inputs = [case.make(torch.float32) for case in cases]
want = [Results()[i] for i in range(len(cases))]
small = [i for i, case in enumerate(cases) if not case.parallel]  # torch's own parallel loops hang in a forked child
loader = torch.utils.data.DataLoader(Results(), num_workers=1, batch_size=None, multiprocessing_context="fork")
for case, got, expected in zip(cases, loader, want):
    assert got == expected, ("worker", case.id)
child = os.fork()
if child == 0:
    signal.alarm(60)
    try:
        for i in small:
            assert Results()[i] == want[i], ("fork", cases[i].id)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the forked child failed"
print(f"{len(cases)} cases equal")
"""


def test_ops_run_in_forked_children():
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=root, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0 and "cases equal" in ran.stdout, ran.stdout + ran.stderr[-3000:]
