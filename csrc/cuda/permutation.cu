// build_routing: a stable counting sort of the T*K slots by expert, in two launches.
//
// The slots are cut into chunks of FM_CHUNK. Launch 1 counts each chunk's slots per expert. In launch 2 every chunk
// sums all counts for itself, which gives the first row of an expert here, and gives its slots their rows. With a
// capacity the counts are also split by choice k, since first choices of all tokens come before second ones when an
// expert is full. Letters: E experts, K choices, J = K with a capacity and 1 without, C chunks. Ids outside 0..E-1 are
// dropped. The sizes are macros, set for exact shapes when the file is compiled at run time.

#ifndef FM_E
#define FM_E 64
#endif
#ifndef FM_K
#define FM_K 8
#endif
#ifndef FM_CHUNK
#define FM_CHUNK 512  // slots; a multiple of FM_K
#endif
#ifndef FM_CAPPED
#define FM_CAPPED 1
#endif
#ifndef FM_ID64
#define FM_ID64 1
#endif

namespace {

#if FM_ID64
using Id = long long;
#else
using Id = int;
#endif

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int J = FM_CAPPED ? FM_K : 1;
static_assert(FM_CHUNK % J == 0, "a chunk holds whole tokens");
constexpr int kCounters = FM_E < 8192 ? FM_E : 8192;  // in shared memory

// The expert of a slot, -1 where there is none.
__device__ int expert_of(const Id* ids, long long slot, long long slots) {
    if (slot >= slots) return -1;
    const Id id = ids[slot];
    return id >= 0 && id < FM_E ? static_cast<int>(id) : -1;
}

// Sum over this lane and the lanes below it.
__device__ int sum_up_to(int value, int lane) {
    for (int step = 1; step < kWarp; step *= 2) {
        const int below = __shfl_up_sync(kAll, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// counter[key] for each lane's key before this call, plus the lanes below with the same key; then counts them all in.
// Keys below 0 count nothing.
__device__ int count_in(int* counter, int key, int lane) {
    const unsigned same = __match_any_sync(kAll, key);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int before = key >= 0 ? counter[key] : 0;
    __syncwarp();
    if (key >= 0 && rank == 0) counter[key] = before + __popc(same);
    __syncwarp();
    return before + rank;
}

}  // namespace

// One block a chunk: counts[j, chunk, e].
extern "C" __global__ void fm_routing_count(const Id* ids, int* counts, long long slots, long long chunks) {
    __shared__ int count_E[kCounters];
    const long long chunk = blockIdx.x;
    for (int j = 0; j < J; ++j) {
        for (int first = 0; first < FM_E; first += kCounters) {
            for (int e = threadIdx.x; e < kCounters; e += blockDim.x) count_E[e] = 0;
            __syncthreads();
            for (int place = j + threadIdx.x * J; place < FM_CHUNK; place += blockDim.x * J) {
                const int e = expert_of(ids, chunk * FM_CHUNK + place, slots) - first;
                if (e >= 0 && e < kCounters) atomicAdd(&count_E[e], 1);
            }
            __syncthreads();
            for (int e = threadIdx.x; e < kCounters && first + e < FM_E; e += blockDim.x)
                counts[(j * chunks + chunk) * FM_E + first + e] = count_E[e];
            __syncthreads();
        }
    }
}

// One block a chunk, of which one warp gives the rows: offsets, src_row, dst_row. Scratch of each chunk: kept[chunk, e]
// rows of an expert, before[chunk, e] those of earlier chunks, with a capacity quotas[chunk, j, e] slots that it may
// still keep.
extern "C" __global__ void fm_routing_place(const Id* ids, const int* counts, int* scratch, int* offsets, int* src_row,
                                            int* dst_row, long long slots, long long chunks, long long capacity) {
    const int lane = threadIdx.x;
    const long long chunk = blockIdx.x;
    int* kept_E = scratch + chunk * FM_E * (FM_CAPPED ? 3 + J : 3);
    int* before_E = kept_E + FM_E;
    int* quota_JE = kept_E + 3 * FM_E;
#if FM_E <= 8192
    __shared__ int next_E[FM_E];
#else
    int* next_E = kept_E + 2 * FM_E;
#endif
    for (int e = threadIdx.x; e < FM_E; e += blockDim.x) {
        int kept = 0, before = 0;
        long long seen = 0;
        for (int j = 0; j < J; ++j) {
            int total = 0, earlier = 0;
#pragma unroll 16
            for (long long c = 0; c < chunks; ++c) {
                const int count = counts[(j * chunks + c) * FM_E + e];
                total += count;
                earlier += c < chunk ? count : 0;
            }
            if (FM_CAPPED) {
                const int room = capacity > seen ? static_cast<int>(capacity - seen) : 0;
                seen += total;
                total = total < room ? total : room;
                earlier = earlier < room ? earlier : room;
                quota_JE[j * FM_E + e] = room - earlier;
            }
            kept += total;
            before += earlier;
        }
        kept_E[e] = kept;
        before_E[e] = before;
    }
    __syncthreads();
    if (lane >= kWarp) return;
#if FM_CAPPED
    __shared__ unsigned char keep_S[FM_CHUNK];
    for (int j = 0; j < J; ++j) {
        for (int e = lane; e < FM_E; e += kWarp) next_E[e] = 0;
        __syncwarp();
        for (int first = j; first < FM_CHUNK; first += kWarp * J) {
            const int place = first + lane * J;
            const int e = place < FM_CHUNK ? expert_of(ids, chunk * FM_CHUNK + place, slots) : -1;
            const int rank = count_in(next_E, e, lane);
            if (place < FM_CHUNK) keep_S[place] = e >= 0 && rank < quota_JE[j * FM_E + e];
        }
        __syncwarp();
    }
#endif
    int used = 0;
    for (int first = 0; first < FM_E; first += kWarp) {
        const int e = first + lane;
        const int kept = e < FM_E ? kept_E[e] : 0;
        const int up_to = sum_up_to(kept, lane);
        if (e < FM_E) {
            next_E[e] = used + up_to - kept + before_E[e];
            if (chunk == 0) offsets[e] = used + up_to - kept;
        }
        used += __shfl_sync(kAll, up_to, kWarp - 1);
    }
    if (chunk == 0 && lane == 0) offsets[FM_E] = used;
    __syncwarp();
    for (int first = 0; first < FM_CHUNK; first += kWarp) {
        const int place = first + lane;
        const long long slot = chunk * FM_CHUNK + place;
        int e = place < FM_CHUNK ? expert_of(ids, slot, slots) : -1;
#if FM_CAPPED
        if (e >= 0 && !keep_S[place]) e = -1;
#endif
        const int rank = count_in(next_E, e, lane);
        if (place >= FM_CHUNK || slot >= slots) continue;
        dst_row[slot] = e >= 0 ? rank : -1;
        if (e >= 0) src_row[rank] = static_cast<int>(slot);
        if (slot >= used) src_row[slot] = -1;
    }
}
