"""The memory behind native.empty: lent as ordinary tensors, taken back when torch frees them, reused, bounded."""

import io
import pickle
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastmoe import native, testing

MIB = 1 << 20


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    """A pool of the test's own, so that nothing else's memory counts."""
    monkeypatch.setattr(native, "_pool", native._Pool())
    return native._pool


def bytes_of(mib):
    return native.empty(int(mib * MIB), dtype=torch.uint8)


def run(code):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"MIB = {MIB}\nimport torch\nfrom fastmoe import native\n{code}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32, torch.int64]
)
def test_is_an_ordinary_tensor_that_owns_its_memory(dtype):
    tensor = native.empty(3, 1001, 701, dtype=dtype)
    if tensor.nbytes < 4 * MIB:
        tensor = native.empty(9, 1001, 701, dtype=dtype)
    assert tensor.dtype == dtype and tensor.is_contiguous() and tensor.shape[1:] == (1001, 701)
    assert not tensor._is_view() and not tensor.requires_grad and tensor.is_leaf
    assert tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0
    assert tensor.data_ptr() % (2 * MIB) == 0
    assert native.memory_stats().in_use - tensor.nbytes in range(4096)


def test_small_memory_is_torchs_own():
    assert native.empty(MIB - 1).untyped_storage().resizable() and native.empty(0, 5).shape == (0, 5)
    assert native.empty().shape == () and native.memory_stats() == (0, 0, 0)
    with pytest.raises(RuntimeError):
        native.empty(-3000, -3000)


def test_memory_comes_back_without_page_faults():
    tensor = bytes_of(64).fill_(1)
    address = tensor.data_ptr()
    del tensor
    assert native.memory_stats() == (0, 64 * MIB, 64 * MIB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    again = bytes_of(60).fill_(2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 200, "fresh memory: 16,384 or 32 huge ones"
    assert again.data_ptr() == address and again.untyped_storage().nbytes() == 60 * MIB
    assert native.memory_stats() == (64 * MIB, 0, 64 * MIB)


def test_a_block_serves_the_tightest_fit_up_to_a_quarter_larger():
    a, b, c = bytes_of(10), bytes_of(12), bytes_of(20)
    addresses = {name: tensor.data_ptr() for name, tensor in (("a", a), ("b", b), ("c", c))}
    del a, b, c
    assert bytes_of(9.9).data_ptr() == addresses["a"]
    assert bytes_of(10.5).data_ptr() == addresses["b"]
    assert bytes_of(16).data_ptr() == addresses["c"]
    assert bytes_of(15.9).data_ptr() not in addresses.values()
    d, e = bytes_of(10), bytes_of(10)
    last = e.data_ptr()
    del d, e
    assert bytes_of(10).data_ptr() == last, "of equal blocks the one used last"


@pytest.mark.parametrize(
    "holder",
    [
        lambda tensor: tensor[5:9],
        lambda tensor: tensor.view(torch.int32).numpy()[::2],
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: torch.from_dlpack(tensor),
    ],
)
def test_what_is_alive_is_never_lent_again(holder):
    tensor = bytes_of(8).fill_(7)
    address, held = tensor.data_ptr(), holder(tensor)
    del tensor
    assert native.memory_stats().in_use == 8 * MIB and bytes_of(8).fill_(1).data_ptr() != address
    assert held[0] in (7, 0x07070707)
    del held
    assert native.memory_stats().in_use == 0 and bytes_of(8).data_ptr() == address


def test_idle_memory_is_at_most_what_was_in_use_at_once(pool):
    for mib in (8, 16, 32, 64):
        bytes_of(mib)
        in_use, idle, peak = native.memory_stats()
        assert in_use == 0 and idle <= peak == mib * MIB
    assert [block.size for block in pool.idle] == [64 * MIB], "the oldest go first"
    several = [bytes_of(mib) for mib in (8, 16, 32)]
    assert native.memory_stats() == (56 * MIB, 64 * MIB, 64 * MIB)
    del several
    assert native.memory_stats() == (0, 56 * MIB, 64 * MIB)


def test_blocks_that_serve_nobody_are_unmapped(pool, monkeypatch):
    monkeypatch.setattr(native, "_OLD", 10)
    held = bytes_of(100)
    bytes_of(32)
    for _ in range(10):
        bytes_of(8)
    assert [block.size for block in pool.idle] == [32 * MIB, 8 * MIB]
    bytes_of(8)
    bytes_of(8)
    assert [block.size for block in pool.idle] == [8 * MIB]
    assert held.numel() == 100 * MIB


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_empty_cache_gives_the_memory_back():
    bytes_of(256).fill_(1)
    kept = bytes_of(16).fill_(3)
    before = resident()
    native.empty_cache()
    assert before - resident() > 200 * MIB and native.memory_stats() == (16 * MIB, 0, 256 * MIB)
    assert bool((kept == 3).all())


def test_threads_share_it(pool):
    errors = []

    def work(seed):
        draw = testing.generator(seed)
        held = []
        for i in range(60):
            size = 4 * MIB + int(torch.randint(3 * MIB, (1,), generator=draw))
            held.append((native.empty(size, dtype=torch.uint8).fill_((seed * 60 + i) % 251), (seed * 60 + i) % 251))
            if len(held) > 3:
                tensor, value = held.pop(int(torch.randint(4, (1,), generator=draw)))
                if not bool((tensor == value).all()):
                    errors.append((seed, i))
                del tensor

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    in_use, idle, peak = native.memory_stats()
    assert not errors and in_use == 0 and idle == sum(block.size for block in pool.idle) <= peak


def test_garbage_collection_inside_the_pool_cannot_hang():
    """Tensors die in cycles, and the collector that finds them runs while the pool's lock is held."""
    out = run("""
import gc, signal
signal.alarm(60)  # a hang is a failure
class Node: pass
def cycle():
    node = Node()
    node.self, node.tensor = node, native.empty(4 * MIB, dtype=torch.uint8)
native._Pool.settle = (lambda settle: lambda self: (gc.collect(), settle(self)))(native._Pool.settle)
for _ in range(30):
    cycle()
gc.collect()
print(*native.memory_stats()[:2])
""")
    in_use, idle = map(int, out.split())
    assert in_use == 0 and idle <= 8 * MIB


@pytest.mark.parametrize("dtype", [*testing.DTYPES, torch.int8, torch.int32, torch.bool], ids=str)
def test_poisoned_memory_is_poisoned_every_time(dtype):
    for _ in range(2):
        with testing.poison():
            tensor, plain = native.empty(8 * MIB, dtype=dtype), torch.empty(1, dtype=dtype)
            assert bool(tensor.isnan().all() if dtype.is_floating_point else (tensor == plain).all())
        tensor.zero_()


def test_storage_moves_as_torchs_own_does():
    tensor = native.empty(2, MIB).copy_(torch.arange(2 * MIB).view(2, MIB))
    want = tensor.clone()
    file = io.BytesIO()
    torch.save(tensor, file)
    assert file.tell() < tensor.nbytes + 4096, "the tensor's bytes and no more"
    file.seek(0)
    assert torch.equal(torch.load(file), want) and torch.equal(pickle.loads(pickle.dumps(tensor)), want)
    assert torch.equal(torch.from_dlpack(tensor), want)
    array = tensor.numpy()
    tensor.share_memory_()
    assert tensor.is_shared() and torch.equal(tensor, want) and array is not None
    del array
    assert native.memory_stats().in_use == 0, "shared memory is the system's, ours came back"
    with pytest.raises(RuntimeError, match="not resizable"):
        native.empty(MIB).resize_(2 * MIB)
    assert native.empty(MIB, 2).resize_(2, 3).shape == (2, 3), "smaller needs no new storage"


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return native.empty(*x.shape).copy_(x)

    backward = forward


def test_serves_as_gradient_through_training_steps():
    weight = torch.nn.Parameter(torch.ones(2, MIB))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.5)
    for step in range(4):
        Copy.apply(weight).mul(2).sum().backward()
        assert bool((weight.grad == 2).all()) and weight.grad.data_ptr() % (2 * MIB) == 0, "taken without a copy"
        address = weight.grad.data_ptr()
        weight.grad.div_(2).add_(torch.zeros(2, MIB))  # as an all-reduce would, in place
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        assert weight.grad is None if step % 2 == 0 else weight.grad.data_ptr() == address
    assert weight[1, 5].item() == 1 - 0.5 * (1 + 1.5 + 1.75 + 1.875)
    weight.grad = None
    assert native.memory_stats().in_use == 0


def test_interpreter_exits_with_tensors_alive():
    out = run("""
import atexit, builtins, ctypes
def tensor(value): return native.empty(MIB).fill_(value)
tensor(0)
first = builtins.owner = tensor(1)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor(2)))
weight = torch.nn.Parameter(torch.zeros(MIB))
weight.grad, loss = tensor(3), (weight * tensor(4)).sum()
class Node: pass
node = Node()
node.node, node.tensor = node, tensor(5)
class Late:
    tensor = tensor(6)
    def __del__(self, empty=native.empty, first=first):
        later = [empty(1 << 20).fill_(9) for _ in range(9)]
        print("late", int(first.mean()), int(self.tensor.mean()))
builtins.late = Late()
atexit.register(lambda: print("atexit", int(first.mean()), int(tensor(7).mean())))
""")
    assert out.split("\n") == ["atexit 1 7", "late 1 6", ""]


def test_forked_children_use_memory_of_their_own():
    run("""
import os, signal, threading
torch.set_num_threads(1)  # torch's own loops hang in a forked child
native._OLD = 1 << 60
held, idle = native.empty(4 * MIB).fill_(1), native.empty(8 * MIB).fill_(5)
address = idle.data_ptr()
del idle
stop = threading.Event()
def churn():
    while not stop.is_set():
        native.empty(2 * MIB)
thread = threading.Thread(target=churn, daemon=True)
thread.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        fine = native.memory_stats().idle == 0 and bool((held == 1).all())
        held.fill_(2)
        for _ in range(3):
            fine &= bool((native.empty(8 * MIB).fill_(6) == 6).all())
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
assert bool((held == 1).all())
again = native.empty(8 * MIB)
assert again.data_ptr() == address and bool((again == 5).all()), "the parent's idle block is as it was"
""")


def test_out_of_memory_first_empties_the_pool_then_names_the_bytes():
    out = run("""
import resource
torch.set_num_threads(1)
native.empty(400 * MIB, dtype=torch.uint8)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * MIB, used + 100 * MIB))
served = native.empty(250 * MIB, dtype=torch.uint8)  # fits only in place of the idle block
assert native.memory_stats() == (250 * MIB, 0, 400 * MIB)
try:
    native.empty(900 * MIB, dtype=torch.uint8)
except torch.OutOfMemoryError as error:
    print(error)
assert native.memory_stats().in_use == 250 * MIB
""")
    assert out.startswith(
        f"fastmoe.native.empty: {900 * MIB} bytes are wanted beside {250 * MIB} in use, got [Errno 12]"
    )


def test_workspace_is_kept_by_a_thread():
    first = native.workspace(8 * MIB)
    assert native.workspace(6 * MIB) is first and first.data_ptr() % 64 == 0
    others = []
    thread = threading.Thread(target=lambda: others.append(native.workspace(6 * MIB).data_ptr()))
    thread.start(), thread.join()
    assert others[0] != first.data_ptr()
    native._kept.workspace = None


def huge_pages_of(address):
    """Whether the mapping that holds the address asks for huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            inside = low <= address < high
        elif inside and line.startswith("VmFlags"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the address")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_weights_of_experts_lie_in_huge_pages():
    from fastmoe.nn import Experts

    experts = Experts(d_model=64, d_ff=1024, num_experts=64)
    middle = experts.gate_up_proj.numel() * 2  # bytes
    assert huge_pages_of(experts.gate_up_proj.data_ptr() + middle)
    other = torch.empty(experts.gate_up_proj.shape)
    assert not huge_pages_of(other.data_ptr() + middle)


def test_huge_pages_leaves_other_tensors_alone():
    for tensor in (torch.empty(8), torch.empty(1 << 24, device="meta")):
        assert native.huge_pages(tensor) is tensor
