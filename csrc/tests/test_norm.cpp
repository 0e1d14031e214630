#include "fastmoe/norm.h"

#include "check.h"

DECLARE_VARIANTS(fm_normalize_cpu)
DECLARE_VARIANTS(fm_normalize_backward_cpu)

namespace {

constexpr float kEps = 1e-5f;

struct Kind {
    bool center, bias, add;
};

void check_shape(fm_dtype dtype, fm_dtype weight_dtype, int64_t T, int64_t D, Kind kind) {
    Draw draw;
    Stored x(dtype, T * D, draw), residual(dtype, T * D, draw), total(dtype, T * D), weight(weight_dtype, D, draw),
        bias(weight_dtype, D, draw), dy(dtype, T * D, draw), dsum(dtype, T * D, draw), mean(FM_F32, T), rstd(FM_F32, T);
    std::vector<double> unit(size_t(T * D)), exact_dweight(static_cast<size_t>(D)), exact_dbias(static_cast<size_t>(D));
    for (int64_t t = 0; t < T; ++t) {
        double level = 0, squares = 0;
        for (int64_t d = t * D; d < (t + 1) * D; ++d) {
            total.set(d, kind.add ? x[d] + residual[d] : x[d]);
            level += kind.center ? total[d] / double(D) : 0;
        }
        mean.set(t, level);
        for (int64_t d = t * D; d < (t + 1) * D; ++d) squares += (total[d] - level) * (total[d] - level);
        const double r = 1 / std::sqrt(squares / double(D) + kEps);
        rstd.set(t, r);
        for (int64_t d = 0; d < D; ++d) {
            unit[size_t(t * D + d)] = (total[t * D + d] - level) * r;
            exact_dweight[size_t(d)] += dy[t * D + d] * unit[size_t(t * D + d)];
            exact_dbias[size_t(d)] += dy[t * D + d];
        }
    }
    for (auto run : VARIANTS(fm_normalize_cpu)) {
        Stored first(dtype, 0);
        for (int threads : {1, 2, 3}) {
            Stored y(dtype, T * D), got_sum(dtype, T * D), got_mean(FM_F32, T), got_rstd(FM_F32, T);
            fm_normalize_cpu_args a{x.data(),
                                    kind.add ? residual.data() : nullptr,
                                    weight.data(),
                                    kind.bias ? bias.data() : nullptr,
                                    kind.add ? got_sum.data() : nullptr,
                                    y.data(),
                                    kind.center ? got_mean.floats() : nullptr,
                                    got_rstd.floats(),
                                    T,
                                    D,
                                    kEps,
                                    dtype,
                                    weight_dtype,
                                    threads};
            CHECK(run(&a) == FM_OK);
            if (threads == 1) {
                first = y;
                for (int64_t t = 0; t < T; ++t) {
                    CHECK_NEAR(got_rstd[t], rstd[t], 2e-6 * rstd[t]);
                    if (kind.center) CHECK_NEAR(got_mean[t], mean[t], 1e-6);
                    for (int64_t d = 0; d < D; ++d) {
                        const int64_t i = t * D + d;
                        const double exact = unit[size_t(i)] * weight[d] + (kind.bias ? bias[d] : 0);
                        CHECK_NEAR(y[i], exact, epsilon(dtype) * std::fabs(exact) + 2e-6 * (1 + rstd[t]));
                    }
                }
                if (kind.add) CHECK(got_sum == total);
            }
            CHECK(y == first);
        }
    }
    for (auto run : VARIANTS(fm_normalize_backward_cpu)) {
        Stored first(dtype, 0), first_dweight(weight_dtype, 0), first_dbias(weight_dtype, 0);
        for (int threads : {1, 2, 3}) {
            Stored dx(dtype, T * D), dweight(weight_dtype, D), dbias(weight_dtype, D);
            std::vector<float> workspace(size_t(fm_normalize_backward_workspace(T, D)), NAN);
            fm_normalize_backward_cpu_args a{dy.data(),
                                             kind.add ? dsum.data() : nullptr,
                                             total.data(),
                                             weight.data(),
                                             kind.center ? mean.floats() : nullptr,
                                             rstd.floats(),
                                             dx.data(),
                                             dweight.data(),
                                             kind.bias ? dbias.data() : nullptr,
                                             workspace.data(),
                                             T,
                                             D,
                                             dtype,
                                             weight_dtype,
                                             threads};
            CHECK(run(&a) == FM_OK);
            if (threads == 1) {
                first = dx, first_dweight = dweight, first_dbias = dbias;
                for (int64_t t = 0; t < T; ++t) {
                    double along = 0, level = 0;
                    const double slip = kind.center ? 2e-7 : 0; /* of the mean, which the unit row is off by */
                    for (int64_t d = 0; d < D; ++d) {
                        along += dy[t * D + d] * weight[d] * unit[size_t(t * D + d)] / double(D);
                        level += kind.center ? dy[t * D + d] * weight[d] / double(D) : 0;
                    }
                    for (int64_t d = 0; d < D; ++d) {
                        const int64_t i = t * D + d;
                        const double exact =
                            rstd[t] * (dy[i] * weight[d] - unit[size_t(i)] * along - level) + (kind.add ? dsum[i] : 0);
                        CHECK_NEAR(dx[i], exact,
                                   epsilon(dtype) * std::fabs(exact) + 4e-6 * (rstd[t] + 1) + slip * rstd[t] * rstd[t]);
                    }
                }
                for (int64_t d = 0; d < D; ++d) {
                    const double scale = 5e-7 * std::sqrt(double(T) + 1), exact = exact_dweight[size_t(d)];
                    CHECK_NEAR(dweight[d], exact, epsilon(weight_dtype) * std::fabs(exact) + scale);
                    const double sum = exact_dbias[size_t(d)];
                    if (kind.bias) CHECK_NEAR(dbias[d], sum, epsilon(weight_dtype) * std::fabs(sum) + scale);
                }
            }
            CHECK(dx == first && dweight == first_dweight && (!kind.bias || dbias == first_dbias));
        }
    }
}

void check_bad() {
    float x[4] = {}, rstd[1] = {};
    for (auto run : VARIANTS(fm_normalize_cpu)) {
        fm_normalize_cpu_args a{x, nullptr, x, nullptr, nullptr, x, nullptr, rstd, 1, 4, kEps, FM_F32, FM_BF16, 1};
        CHECK(run(&a) == FM_BAD_DTYPE);
        a.dtype = fm_dtype(3);
        CHECK(run(&a) == FM_BAD_DTYPE);
    }
    for (auto run : VARIANTS(fm_normalize_backward_cpu)) {
        fm_normalize_backward_cpu_args a{x, nullptr, x, x, nullptr, rstd, x, x, x, x, 1, 4, FM_F16, FM_BF16, 1};
        CHECK(run(&a) == FM_BAD_DTYPE);
    }
}

}  // namespace

int main() {
    const int64_t shapes[][2] = {{0, 8}, {1, 1}, {3, 5}, {65, 17}, {200, 96}, {9, 1030}, {16500, 3}};
    const Kind kinds[] = {{false, false, false}, {false, false, true}, {true, true, false}, {true, true, true}};
    for (const auto& shape : shapes)
        for (fm_dtype dtype : kDtypes)
            for (const Kind& kind : kinds) {
                check_shape(dtype, FM_F32, shape[0], shape[1], kind);
                if (dtype != FM_F32) check_shape(dtype, dtype, shape[0], shape[1], kind);
            }
    check_bad();
}
