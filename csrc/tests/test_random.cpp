#include "fastmoe/random.h"

#include "check.h"

DECLARE_VARIANTS(fm_random_uniform_cpu)

namespace {

void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xd2511f53u) * c[0], p1 = uint64_t(0xcd9e8d57u) * c[2];
        const uint32_t next[] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1,
                                 uint32_t(p0)};
        std::memcpy(c, next, sizeof(next));
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
}

// Random123's kat_vectors: counter, key, words.
void check_known_answers() {
    const uint32_t vectors[][10] = {{0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                                    {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                                    {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
                                     0x94fdcceb, 0x5001e420, 0x24126ea1}};
    for (const auto& v : vectors) {
        uint32_t words[4] = {v[0], v[1], v[2], v[3]};
        philox(words, v[4], v[5]);
        CHECK(std::memcmp(words, v + 6, sizeof(words)) == 0);
    }
}

void check_uniform(int64_t T, int64_t N, int64_t first, int64_t layer) {
    const int64_t key[] = {-5, (int64_t(1) << 40) + 7, first};
    std::vector<float> want(size_t(T * N));
    for (int64_t t = 0; t < T; ++t)
        for (int64_t n = 0; n < N; ++n) {
            const uint64_t token = uint64_t(first) + uint64_t(t);
            uint32_t words[4] = {uint32_t(token), uint32_t(token >> 32), uint32_t(n / 4), uint32_t(layer)};
            philox(words, uint32_t(-5), 7);
            want[size_t(t * N + n)] = float(words[n % 4] >> 8) * 0x1p-24f;
        }
    for (auto run : VARIANTS(fm_random_uniform_cpu))
        for (int threads : {1, 2, 3}) {
            std::vector<float> got(want.size(), NAN);
            fm_random_uniform_cpu_args a{key, layer, T, N, got.data(), threads};
            CHECK(run(&a) == FM_OK);
            CHECK(got == want);
        }
}

}  // namespace

int main() {
    check_known_answers();
    const int64_t shapes[][2] = {{0, 4},   {3, 0},  {1, 1},   {9, 3},     {70, 4},
                                 {31, 13}, {5, 60}, {3, 257}, {20000, 1}, {3000, 9}};
    for (const auto& shape : shapes)
        for (int64_t first : {int64_t(0), (int64_t(1) << 32) - 3, INT64_MAX - 1}) {
            check_uniform(shape[0], shape[1], first, 0);
            check_uniform(shape[0], shape[1], first, (int64_t(1) << 32) - 1);
        }
}
