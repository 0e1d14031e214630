#include "fastmoe/loss.h"

#include <algorithm>

#include "check.h"

DECLARE_VARIANTS(fm_linear_cross_entropy_cpu)

namespace {

struct Loss {
    float loss = NAN;
    Stored dx, dweight;
    fm_status status;
    int64_t bad;

    Loss(fm_status (*run)(fm_linear_cross_entropy_cpu_args*), Stored& x, Stored& weight,
         const std::vector<int64_t>& targets, int64_t D, int64_t V, int64_t ignore_index, bool need_x, bool need_weight,
         int threads)
        : dx(FM_F32, int64_t(targets.size()) * D), dweight(FM_F32, V * D) {
        const int64_t T = int64_t(targets.size()), bytes = fm_linear_cross_entropy_workspace(T, V, threads);
        void* workspace;
        CHECK(posix_memalign(&workspace, 64, size_t(bytes)) == 0);
        std::memset(workspace, 0xff, size_t(bytes));
        fm_linear_cross_entropy_cpu_args a{x.data(),
                                           weight.data(),
                                           targets.data(),
                                           &loss,
                                           need_x ? dx.floats() : nullptr,
                                           need_weight ? dweight.floats() : nullptr,
                                           T,
                                           D,
                                           V,
                                           ignore_index,
                                           x.dtype,
                                           workspace,
                                           threads,
                                           0};
        status = run(&a);
        bad = a.bad;
        std::free(workspace);
    }
};

void check_shape(int64_t T, int64_t D, int64_t V, fm_dtype dtype) {
    Draw draw;
    Stored x(dtype, T * D, draw), weight(dtype, V * D, draw);
    std::vector<int64_t> targets(static_cast<size_t>(T));
    for (int64_t& target : targets) target = draw.integer(4) ? draw.integer(V) : -100;
    double loss = 0;
    std::vector<double> dx(size_t(T * D)), dweight(size_t(V * D));
    for (int64_t t = 0; t < T; ++t) {
        if (targets[size_t(t)] == -100) continue;
        std::vector<double> z(static_cast<size_t>(V));
        double total = 0;
        for (int64_t v = 0; v < V; ++v)
            for (int64_t d = 0; d < D; ++d) z[size_t(v)] += x[t * D + d] * weight[v * D + d];
        const double top = *std::max_element(z.begin(), z.end());
        for (double value : z) total += std::exp(value - top);
        loss += std::log(total) + top - z[size_t(targets[size_t(t)])];
        for (int64_t v = 0; v < V; ++v) {
            const double dz = std::exp(z[size_t(v)] - top) / total - (v == targets[size_t(t)]);
            for (int64_t d = 0; d < D; ++d) {
                dx[size_t(t * D + d)] += dz * weight[v * D + d];
                dweight[size_t(v * D + d)] += dz * x[t * D + d];
            }
        }
    }
    for (auto run : VARIANTS(fm_linear_cross_entropy_cpu)) {
        const Loss first(run, x, weight, targets, D, V, -100, true, true, 1);
        CHECK(first.status == FM_OK);
        CHECK_NEAR(first.loss, loss, 2e-6 * (loss + double(T)));
        const bool pairs = dtype == FM_BF16 && std::strcmp(fm_isa(), "avx512bf16") == 0 &&
                           (run == fm_linear_cross_entropy_cpu || run == fm_linear_cross_entropy_cpu_avx512bf16);
        const double step = 2e-5 + (pairs ? epsilon(dtype) : 0);  // pairs round the logits' gradient to bfloat16
        for (int64_t i = 0; i < T * D; ++i) CHECK_NEAR(first.dx[i], dx[size_t(i)], step);
        for (int64_t i = 0; i < V * D; ++i)
            CHECK_NEAR(first.dweight[i], dweight[size_t(i)], step * std::sqrt(double(T) + 1));
        for (int threads : {2, 3}) {
            const Loss again(run, x, weight, targets, D, V, -100, true, true, threads);
            CHECK(again.loss == first.loss && again.dx == first.dx && again.dweight == first.dweight);
        }
        CHECK(Loss(run, x, weight, targets, D, V, -100, false, false, 2).loss == first.loss);
        CHECK(Loss(run, x, weight, targets, D, V, -100, true, false, 2).dx == first.dx);
        CHECK(Loss(run, x, weight, targets, D, V, -100, false, true, 2).dweight == first.dweight);
    }
}

void check_bad() {
    Draw draw;
    Stored x(FM_F32, 5 * 3, draw), weight(FM_F32, 7 * 3, draw);
    for (auto run : VARIANTS(fm_linear_cross_entropy_cpu)) {
        for (int64_t wrong : {int64_t(7), int64_t(-1), INT64_MIN}) {
            const Loss loss(run, x, weight, {1, -100, wrong, 8, 0}, 3, 7, -100, true, true, 2);
            CHECK(loss.status == FM_BAD_VALUE && loss.bad == wrong);
        }
        CHECK(Loss(run, x, weight, {1, -1, 0, 6, -1}, 3, 7, -1, true, true, 1).status == FM_OK);
        x.dtype = fm_dtype(3);
        CHECK(Loss(run, x, weight, {1, 2, 3, 4, 5}, 3, 7, -100, true, true, 1).status == FM_BAD_DTYPE);
        x.dtype = FM_F32;
    }
}

}  // namespace

int main() {
    const int64_t shapes[][3] = {{0, 8, 16}, {1, 1, 1}, {37, 19, 23}, {100, 40, 130}, {200, 9, 300}};
    for (const auto& s : shapes)
        for (fm_dtype dtype : kDtypes) check_shape(s[0], s[1], s[2], dtype);
    check_bad();
}
