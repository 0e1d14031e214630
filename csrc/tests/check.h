// What the C ABI's test programs share: checks that end the program, draws, storage types, the instruction sets'
// variants.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "fastmoe/common.h"

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (0)

#define CHECK_NEAR(got, want, tolerance)                                                                             \
    do {                                                                                                             \
        const double got_ = (got), want_ = (want), tolerance_ = (tolerance);                                         \
        if (!(std::fabs(got_ - want_) <= tolerance_)) {                                                              \
            std::fprintf(stderr, "%s:%d: %s = %.9g, wanted %s = %.9g within %.3g\n", __FILE__, __LINE__, #got, got_, \
                         #want, want_, tolerance_);                                                                  \
            std::exit(1);                                                                                            \
        }                                                                                                            \
    } while (0)

// Uniform draws from a fixed seed.
struct Draw {
    uint64_t state = 0x9e3779b97f4a7c15u;
    uint64_t bits() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return state;
    }
    double real(double low = -2, double high = 2) {
        return low + (high - low) * double(bits() >> 11) / 9007199254740992.0;
    }
    int64_t integer(int64_t end) { return int64_t(bits() % uint64_t(end)); }  // 0..end-1
};

// n elements of a storage type in a heap block of exactly their size, read and written as doubles; NaN until written.
struct Stored {
    fm_dtype dtype;
    std::vector<unsigned char> bytes;

    static size_t size(fm_dtype dtype) { return dtype == FM_F32 ? 4 : 2; }
    Stored(fm_dtype dtype, int64_t n) : dtype(dtype), bytes(size_t(n) * size(dtype), 0xff) {}
    Stored(fm_dtype dtype, int64_t n, Draw& draw, double low = -2, double high = 2) : Stored(dtype, n) {
        for (int64_t i = 0; i < n; ++i) set(i, draw.real(low, high));
    }
    void* data() { return bytes.data(); }
    float* floats() { return reinterpret_cast<float*>(bytes.data()); }
    double at(int64_t i) const {
        const unsigned char* p = bytes.data() + size_t(i) * size(dtype);
        if (dtype == FM_F16) {
            _Float16 value;
            std::memcpy(&value, p, 2);
            return float(value);
        }
        float value;
        if (dtype == FM_BF16) {
            uint16_t half;
            std::memcpy(&half, p, 2);
            const uint32_t whole = uint32_t(half) << 16;
            std::memcpy(&value, &whole, 4);
        } else {
            std::memcpy(&value, p, 4);
        }
        return value;
    }
    void set(int64_t i, double x) {
        unsigned char* p = bytes.data() + size_t(i) * size(dtype);
        const float value = float(x);
        if (dtype == FM_F16) {
            const _Float16 half = _Float16(value);
            std::memcpy(p, &half, 2);
        } else if (dtype == FM_BF16) {
            uint32_t whole;
            std::memcpy(&whole, &value, 4);
            const uint16_t half = uint16_t((whole + 0x7fff + ((whole >> 16) & 1)) >> 16);
            std::memcpy(p, &half, 2);
        } else {
            std::memcpy(p, &value, 4);
        }
    }
    double operator[](int64_t i) const { return at(i); }
    bool operator==(const Stored& other) const { return bytes == other.bytes; }
};

inline double epsilon(fm_dtype dtype) { return dtype == FM_F32 ? 1.2e-7 : dtype == FM_F16 ? 9.8e-4 : 7.9e-3; }
constexpr fm_dtype kDtypes[] = {FM_F32, FM_BF16, FM_F16};

// Every implementation of an op that this machine can run: the public one first, then each instruction set's.
template <class Args>
std::vector<fm_status (*)(Args*)> variants(fm_status (*open)(Args*), fm_status (*baseline)(Args*),
                                           fm_status (*avx2)(Args*), fm_status (*wide)(Args*),
                                           fm_status (*avx512)(Args*), fm_status (*avx512bf16)(Args*)) {
    __builtin_cpu_init();
    std::vector<fm_status (*)(Args*)> result{open, baseline};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        result.push_back(avx2);
        result.push_back(wide);
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        result.push_back(avx512);
    if (std::strcmp(fm_isa(), "avx512bf16") == 0) result.push_back(avx512bf16);
    return result;
}
#define DECLARE_VARIANTS(name)                          \
    extern "C" fm_status name##_baseline(name##_args*); \
    extern "C" fm_status name##_avx2(name##_args*);     \
    extern "C" fm_status name##_wide(name##_args*);     \
    extern "C" fm_status name##_avx512(name##_args*);   \
    extern "C" fm_status name##_avx512bf16(name##_args*);
#define VARIANTS(name) \
    variants<name##_args>(name, name##_baseline, name##_avx2, name##_wide, name##_avx512, name##_avx512bf16)
