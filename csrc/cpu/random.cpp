#include "fastmoe/random.h"

#include "random.h"

namespace {
typedef int64_t vl __attribute__((vector_size(FM_VECTOR_BYTES)));
constexpr int64_t kTask = 4096; /* counters */
}  // namespace

FM_KERNEL(fm_random_uniform_cpu) {
    const int64_t N = a->N, blocks = (N + 3) / 4, total = a->T * blocks, tasks = (total + kTask - 1) / kTask;
    const vw layer = vw{} + uint64_t(a->layer);
#pragma omp parallel for num_threads(team(a->T* N, a->num_threads)) schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t begin = task * kTask, end = begin + kTask < total ? begin + kTask : total;
        int64_t at = begin % blocks; /* the block that is written next */
        float* out = a->out_TN + begin / blocks * N + 4 * at;
        vw token;
        vl block;
        for (int i = 0; i < kCounters; ++i) token[i] = (begin + i) / blocks, block[i] = (begin + i) % blocks;
        token += uint64_t(a->key[2]);
        for (int64_t first = begin; first < end; first += kCounters) {
            vw words[4] = {token, token >> 32, bit_cast<vw>(block), layer};
            philox(words, uint32_t(a->key[0]), uint32_t(a->key[1]));
            if (N % 4 == 0 && first + kCounters <= end) {
                store_uniform(out, words);
                out += 2 * W;
            } else {
                float drawn[2 * W];
                store_uniform(drawn, words);
                for (int64_t i = 0; i < kCounters && first + i < end; ++i) {
                    const int64_t draws = N - 4 * at < 4 ? N - 4 * at : 4;
                    for (int64_t n = 0; n < draws; ++n) out[n] = drawn[4 * i + n];
                    out += draws;
                    at = at + 1 < blocks ? at + 1 : 0;
                }
            }
            token += uint64_t(kCounters / blocks), block += kCounters % blocks;
            const vl past = block >= blocks;
            block -= past & blocks, token -= bit_cast<vw>(past);
        }
    }
    return FM_OK;
}
