#include "fastmoe/gemm.h"

#include "check.h"

DECLARE_VARIANTS(fm_linear_cpu)
DECLARE_VARIANTS(fm_linear_backward_cpu)

namespace {

// 64-byte aligned bytes, all ones: as floats NaN.
struct Workspace {
    void* data;
    explicit Workspace(int threads) {
        const size_t bytes = size_t(fm_linear_workspace(threads));
        CHECK(posix_memalign(&data, 64, bytes) == 0);
        std::memset(data, 0xff, bytes);
    }
    ~Workspace() { std::free(data); }
    Workspace(const Workspace&) = delete;
};

// Against sums in double of `terms` products, none above 4: partial sums grow as sqrt(terms), and so does the sum of
// their roundings over them.
void check_close(const Stored& got, const std::vector<double>& exact, int64_t terms) {
    for (size_t i = 0; i < exact.size(); ++i)
        CHECK_NEAR(got[int64_t(i)], exact[i], epsilon(got.dtype) * std::fabs(exact[i]) + 3e-7 * double(terms + 1));
}

void check_shape(fm_dtype dtype, int64_t T, int64_t I, int64_t O) {
    Draw draw;
    Stored x(dtype, T * I, draw), weight(dtype, O * I, draw), bias(dtype, O, draw), dy(dtype, T * O, draw);
    std::vector<double> y(size_t(T * O)), plain(size_t(T * O)), dx(size_t(T * I)), dweight(size_t(O * I)),
        dbias(static_cast<size_t>(O));
    for (int64_t t = 0; t < T; ++t)
        for (int64_t o = 0; o < O; ++o) {
            const double g = dy[t * O + o];
            double dot = 0;
            for (int64_t i = 0; i < I; ++i) {
                dot += x[t * I + i] * weight[o * I + i];
                dx[size_t(t * I + i)] += g * weight[o * I + i];
                dweight[size_t(o * I + i)] += g * x[t * I + i];
            }
            dbias[size_t(o)] += g;
            plain[size_t(t * O + o)] = dot;
            y[size_t(t * O + o)] = dot + bias[o];
        }
    for (auto run : VARIANTS(fm_linear_cpu))
        for (bool biased : {true, false}) {
            Stored first(dtype, 0);
            for (int threads : {1, 2, 3}) {
                const Workspace workspace(threads);
                Stored got(dtype, T * O);
                fm_linear_cpu_args a{
                    x.data(),       weight.data(), biased ? bias.data() : nullptr, got.data(), T, I, O, dtype,
                    workspace.data, threads};
                CHECK(run(&a) == FM_OK);
                if (threads == 1) first = got;
                CHECK(got == first);
            }
            check_close(first, biased ? y : plain, I);
        }
    for (auto run : VARIANTS(fm_linear_backward_cpu)) {
        Stored first_dx(dtype, 0), first_dweight(dtype, 0), first_dbias(dtype, 0);
        const auto backward = [&](Stored* to_x, Stored* to_weight, Stored* to_bias, int threads) {
            const Workspace workspace(threads);
            fm_linear_backward_cpu_args a{dy.data(),
                                          to_weight ? x.data() : nullptr,
                                          to_x ? weight.data() : nullptr,
                                          to_x ? to_x->data() : nullptr,
                                          to_weight ? to_weight->data() : nullptr,
                                          to_bias ? to_bias->data() : nullptr,
                                          T,
                                          I,
                                          O,
                                          dtype,
                                          workspace.data,
                                          threads};
            CHECK(run(&a) == FM_OK);
        };
        for (int threads : {1, 2, 3}) {
            Stored got_dx(dtype, T * I), got_dweight(dtype, O * I), got_dbias(dtype, O);
            backward(&got_dx, &got_dweight, &got_dbias, threads);
            if (threads == 1) {
                first_dx = got_dx, first_dweight = got_dweight, first_dbias = got_dbias;
                check_close(got_dx, dx, O);
                check_close(got_dweight, dweight, T);
                check_close(got_dbias, dbias, T);
            }
            CHECK(got_dx == first_dx && got_dweight == first_dweight && got_dbias == first_dbias);
        }
        Stored alone_dx(dtype, T * I), alone_dweight(dtype, O * I), alone_dbias(dtype, O);
        backward(&alone_dx, nullptr, nullptr, 2);
        backward(nullptr, &alone_dweight, nullptr, 2);
        backward(nullptr, nullptr, &alone_dbias, 2);
        CHECK(alone_dx == first_dx && alone_dweight == first_dweight && alone_dbias == first_dbias);
    }
}

void check_bad() {
    float x[4] = {};
    const Workspace workspace(1);
    for (auto run : VARIANTS(fm_linear_cpu)) {
        fm_linear_cpu_args a{x, x, x, x, 1, 2, 2, fm_dtype(3), workspace.data, 1};
        CHECK(run(&a) == FM_BAD_DTYPE);
    }
    for (auto run : VARIANTS(fm_linear_backward_cpu)) {
        fm_linear_backward_cpu_args a{x, x, x, x, x, x, 1, 2, 2, fm_dtype(3), workspace.data, 1};
        CHECK(run(&a) == FM_BAD_DTYPE);
    }
}

}  // namespace

int main() {
    const int64_t shapes[][3] = {{0, 8, 5},   {1, 1, 1},   {5, 67, 33},  {6, 7, 9},     {37, 19, 23},
                                 {200, 9, 4}, {70, 1, 50}, {50, 200, 1}, {193, 40, 97}, {300, 130, 65}};
    for (const auto& s : shapes)
        for (fm_dtype dtype : kDtypes) check_shape(dtype, s[0], s[1], s[2]);
    check_bad();
}
