#include "fastmoe/norm.h"

#include "check.h"

DECLARE_VARIANTS(fm_rms_norm_cpu)
DECLARE_VARIANTS(fm_rms_norm_backward_cpu)

namespace {

constexpr float kEps = 1e-5f;

void check_shape(fm_dtype dtype, fm_dtype weight_dtype, int64_t T, int64_t D) {
    Draw draw;
    Stored x(dtype, T * D, draw), weight(weight_dtype, D, draw), dy(dtype, T * D, draw), rstd(FM_F32, T);
    std::vector<double> exact_dweight(static_cast<size_t>(D)), exact_rstd(static_cast<size_t>(T));
    for (int64_t t = 0; t < T; ++t) {
        double squares = 0;
        for (int64_t d = 0; d < D; ++d) squares += x[t * D + d] * x[t * D + d];
        exact_rstd[size_t(t)] = 1 / std::sqrt(squares / double(D) + kEps);
        rstd.set(t, exact_rstd[size_t(t)]);
        for (int64_t d = 0; d < D; ++d)
            exact_dweight[size_t(d)] += dy[t * D + d] * x[t * D + d] * exact_rstd[size_t(t)];
    }
    for (auto run : VARIANTS(fm_rms_norm_cpu)) {
        Stored first(dtype, 0);
        for (int threads : {1, 2, 3}) {
            Stored y(dtype, T * D), got_rstd(FM_F32, T);
            fm_rms_norm_cpu_args a{x.data(), weight.data(), y.data(), got_rstd.floats(), T,
                                   D,        kEps,          dtype,    weight_dtype,      threads};
            CHECK(run(&a) == FM_OK);
            if (threads == 1) {
                first = y;
                for (int64_t t = 0; t < T; ++t) {
                    const double r = exact_rstd[size_t(t)];
                    CHECK_NEAR(got_rstd[t], r, 1e-6 * r);
                    for (int64_t d = 0; d < D; ++d) {
                        const double exact = x[t * D + d] * r * weight[d];
                        CHECK_NEAR(y[t * D + d], exact, (epsilon(dtype) + 1e-6) * std::fabs(exact) + 1e-7);
                    }
                }
            }
            CHECK(y == first);
        }
    }
    for (auto run : VARIANTS(fm_rms_norm_backward_cpu)) {
        Stored first(dtype, 0), first_dweight(weight_dtype, 0);
        for (int threads : {1, 2, 3}) {
            Stored dx(dtype, T * D), dweight(weight_dtype, D);
            std::vector<float> workspace(size_t(fm_rms_norm_backward_workspace(T, D)), NAN);
            fm_rms_norm_backward_cpu_args a{dy.data(), x.data(),       weight.data(),    rstd.floats(),
                                            dx.data(), dweight.data(), workspace.data(), T,
                                            D,         dtype,          weight_dtype,     threads};
            CHECK(run(&a) == FM_OK);
            if (threads == 1) {
                first = dx, first_dweight = dweight;
                for (int64_t t = 0; t < T; ++t) {
                    const double r = exact_rstd[size_t(t)];
                    double mean = 0;
                    for (int64_t d = 0; d < D; ++d) mean += dy[t * D + d] * weight[d] * x[t * D + d] * r / double(D);
                    for (int64_t d = 0; d < D; ++d) {
                        const double exact = r * (dy[t * D + d] * weight[d] - x[t * D + d] * r * mean);
                        CHECK_NEAR(dx[t * D + d], exact, epsilon(dtype) * std::fabs(exact) + 4e-6 * r);
                    }
                }
                for (int64_t d = 0; d < D; ++d) {
                    const double exact = exact_dweight[size_t(d)];
                    CHECK_NEAR(dweight[d], exact,
                               epsilon(weight_dtype) * std::fabs(exact) + 3e-7 * std::sqrt(double(T) + 1));
                }
            }
            CHECK(dx == first && dweight == first_dweight);
        }
    }
}

void check_bad() {
    float x[4] = {}, rstd[1] = {};
    for (auto run : VARIANTS(fm_rms_norm_cpu)) {
        fm_rms_norm_cpu_args a{x, x, x, rstd, 1, 4, kEps, FM_F32, FM_BF16, 1};
        CHECK(run(&a) == FM_BAD_DTYPE);
        a.dtype = fm_dtype(3);
        CHECK(run(&a) == FM_BAD_DTYPE);
    }
    for (auto run : VARIANTS(fm_rms_norm_backward_cpu)) {
        fm_rms_norm_backward_cpu_args a{x, x, x, rstd, x, x, x, 1, 4, FM_F16, FM_BF16, 1};
        CHECK(run(&a) == FM_BAD_DTYPE);
    }
}

}  // namespace

int main() {
    const int64_t shapes[][2] = {{0, 8}, {1, 1}, {3, 5}, {65, 17}, {200, 96}, {9, 1030}, {16500, 3}};
    for (const auto& shape : shapes)
        for (fm_dtype dtype : kDtypes) {
            check_shape(dtype, FM_F32, shape[0], shape[1]);
            if (dtype != FM_F32) check_shape(dtype, dtype, shape[0], shape[1]);
        }
    check_bad();
}
