#include "fastmoe/quantize.h"

#include "check.h"

DECLARE_VARIANTS(fm_quantize_cpu)
DECLARE_VARIANTS(fm_dequantize_cpu)

namespace {

uint32_t word(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
float number(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

uint32_t bits(int64_t key, int64_t row, int64_t column) {
    uint64_t z = uint64_t(key);
    for (int64_t i = 0; i <= row; ++i) z += 0x9e3779b97f4a7c15u;  // splitmix64's counter
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z = z ^ (z >> 31);
    uint32_t x = uint32_t(column * 0x9e3779b1) ^ uint32_t(z);
    x = (x ^ (x >> 16)) * 0x85ebca6bu + uint32_t(z >> 32);
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

struct Coded {
    std::vector<int> codes;
    std::vector<uint16_t> scales;
};

// One value after the other, every product and sum rounded to float.
Coded expected(const std::vector<float>& x, int64_t R, int64_t I, bool is_signed, bool drawn, int64_t key,
               int64_t first) {
    Coded result;
    for (int64_t row = 0; row < R; ++row)
        for (int64_t begin = 0; begin < I; begin += 32) {
            float largest = 0;
            bool finite = true;
            const int64_t end = begin + 32 < I ? begin + 32 : I;
            for (int64_t i = begin; i < end; ++i) {
                const float value = std::fabs(x[size_t(row * I + i)]);
                finite = finite && std::isfinite(value);
                largest = std::fmax(largest, value);
            }
            uint16_t scale = finite ? uint16_t(word(largest) >> 16) : 0x7fc0;
            if (finite && number(uint32_t(scale) << 16) < largest) ++scale;
            result.scales.push_back(scale);
            const float unit = number(uint32_t(scale) << 16);
            for (int64_t i = begin; i < end; ++i) {
                const float value = x[size_t(row * I + i)];
                volatile float code = 0;
                if (finite && unit > 0) code = std::fabs(value) / unit;
                code = (is_signed ? 127.f : 255.f) * std::sqrt(code);
                if (drawn) {
                    code = code + float(bits(key, first + row, i) & 0xff) / 256;
                    code = std::floor(code);
                } else {
                    code = std::nearbyint(code);
                }
                const int whole = int(code);
                result.codes.push_back(is_signed ? (value < 0 ? -whole : whole)
                                                 : (value > 0 ? (whole > 1 ? whole : 1) : 0));
            }
        }
    return result;
}

void check(int64_t R, int64_t I, fm_dtype dtype, bool is_signed, bool drawn, double spread) {
    Draw draw;
    const int64_t key = drawn ? int64_t(draw.bits()) : 0, first = drawn ? 3 : 0, blocks = (I + 31) / 32;
    Stored x(dtype, R * I);
    std::vector<float> values;
    for (int64_t i = 0; i < R * I; ++i) {
        const double size = std::exp(draw.real(-spread, 0)) * (draw.integer(9) ? 1 : 0);
        x.set(i, is_signed ? size * draw.real() : size);
        if (draw.integer(300) == 0) x.set(i, draw.integer(2) ? INFINITY : NAN);
        values.push_back(float(x[i]));
    }
    const Coded want = expected(values, R, I, is_signed, drawn, key, first);
    for (auto run : VARIANTS(fm_quantize_cpu))
        for (int threads : {1, 3}) {
            std::vector<unsigned char> codes(size_t(R * I), 99);
            std::vector<uint16_t> scales(size_t(R * blocks), 99);
            fm_quantize_cpu_args a{x.data(),  codes.data(), scales.data(), R,     I,      dtype,
                                   is_signed, drawn,        key,           first, threads};
            CHECK(run(&a) == FM_OK);
            CHECK(scales == want.scales);
            for (size_t i = 0; i < codes.size(); ++i)
                CHECK((is_signed ? int(int8_t(codes[i])) : int(codes[i])) == want.codes[i]);
        }
    std::vector<unsigned char> codes(want.codes.begin(), want.codes.end());
    for (auto run : VARIANTS(fm_dequantize_cpu))
        for (int threads : {1, 3}) {
            std::vector<float> out(size_t(R * I), NAN);
            std::vector<uint16_t> scales = want.scales;
            fm_dequantize_cpu_args a{codes.data(), scales.data(), out.data(), R, I, is_signed, threads};
            CHECK(run(&a) == FM_OK);
            for (int64_t i = 0; i < R * I; ++i) {
                const float unit = number(uint32_t(scales[size_t(i / I * blocks + i % I / 32)]) << 16);
                const float part = float(want.codes[size_t(i)]) / (is_signed ? 127.f : 255.f);
                volatile float value = unit * part;
                value = value * std::fabs(part);
                CHECK(std::isnan(unit) ? std::isnan(out[size_t(i)]) : word(out[size_t(i)]) == word(value));
            }
        }
}

}  // namespace

int main() {
    const int64_t shapes[][2] = {{0, 5}, {4, 0}, {1, 1}, {3, 31}, {5, 32}, {7, 33}, {2, 95}, {1, 20000}, {300, 70}};
    for (const auto& shape : shapes)
        for (fm_dtype dtype : kDtypes)
            for (bool is_signed : {true, false})
                for (bool drawn : {false, true})
                    for (double spread : {1.0, 30.0, 110.0}) check(shape[0], shape[1], dtype, is_signed, drawn, spread);
    fm_quantize_cpu_args bad{};
    bad.dtype = fm_dtype(3);
    CHECK(fm_quantize_cpu(&bad) == FM_BAD_DTYPE);
}
