// Just enough of CUDA to run a kernel of csrc/cuda on the CPU: blocks one after another, the threads of a block as
// fibers. g++ -shared -fPIC -include csrc/tests/cuda_emulation.h -x c++ csrc/cuda/<family>.cu builds a library whose
// fm_emulate runs them. Every barrier, shuffle and match waits for the whole block, so use it for kernels whose threads
// all reach the same ones. Threads take turns in ascending or descending order: a missing barrier shows as a difference
// between the two.
#pragma once
#include <ucontext.h>
#include <vector>

#define __global__ __attribute__((visibility("default")))
#define __device__ static
#define __shared__ static

struct Dim {
    unsigned x = 1;
};

namespace emulation {

inline Dim thread, block, threads;
inline ucontext_t scheduler;
inline std::vector<ucontext_t> fibers;
inline std::vector<char> running;
inline std::vector<long long> mailbox;
inline void (*kernel)(long long, long long, long long, long long, long long, long long, long long, long long,
                      long long);
inline const long long* arguments;

inline void wait() { swapcontext(&fibers[thread.x], &scheduler); }

inline void fiber() {
    const long long* a = arguments;
    const unsigned self = thread.x;
    kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
    running[self] = 0;
    swapcontext(&fibers[self], &scheduler);
}

inline void run_block(bool descending) {
    constexpr unsigned kStack = 64 << 10;
    std::vector<std::vector<char>> stacks(threads.x, std::vector<char>(kStack));
    running.assign(threads.x, 1);
    for (unsigned i = 0; i < threads.x; ++i) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks[i].data();
        fibers[i].uc_stack.ss_size = kStack;
        fibers[i].uc_link = nullptr;
        makecontext(&fibers[i], fiber, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (unsigned i = 0; i < threads.x; ++i) {
            thread.x = descending ? threads.x - 1 - i : i;
            if (!running[thread.x]) continue;
            any = true;
            swapcontext(&scheduler, &fibers[thread.x]);
        }
    }
}

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define blockDim emulation::threads

inline void __syncthreads() { emulation::wait(); }
inline void __syncwarp() { emulation::wait(); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int* address, int value) { return (*address += value) - value; }

inline int __shfl_sync(unsigned, int value, int lane) {
    emulation::mailbox[threadIdx.x] = value;
    emulation::wait();
    const int got = static_cast<int>(emulation::mailbox[threadIdx.x / 32 * 32 + lane]);
    emulation::wait();
    return got;
}

inline int __shfl_up_sync(unsigned all, int value, int delta) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(all, value, lane >= delta ? lane - delta : lane);
}

inline unsigned __match_any_sync(unsigned, int value) {
    emulation::mailbox[threadIdx.x] = value;
    emulation::wait();
    unsigned same = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (emulation::mailbox[threadIdx.x / 32 * 32 + lane] == value) same |= 1u << lane;
    }
    emulation::wait();
    return same;
}

// Runs kernel<<<grid, block>>>(nine arguments: pointers and 64-bit integers; those it does not take are ignored).
extern "C" __attribute__((visibility("default"))) void fm_emulate(void* kernel, long long grid, long long block,
                                                                  const long long* arguments, int descending) {
    using Kernel = decltype(emulation::kernel);
    emulation::kernel = reinterpret_cast<Kernel>(kernel);
    emulation::arguments = arguments;
    emulation::threads.x = static_cast<unsigned>(block);
    emulation::fibers.resize(block);
    emulation::mailbox.assign(block, 0);
    for (long long b = 0; b < grid; ++b) {
        emulation::block.x = static_cast<unsigned>(b);
        emulation::run_block(descending != 0);
    }
}
