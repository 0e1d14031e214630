#include "fastmoe/adamw.h"

#include "check.h"

DECLARE_VARIANTS(fm_adamw_step_cpu)

namespace {

struct List {
    std::vector<Stored> params, grads, ms, vs;

    List(const std::vector<int64_t>& sizes, Draw& draw) {
        for (size_t i = 0; i < sizes.size(); ++i) {
            params.emplace_back(kDtypes[i % 3], sizes[i], draw);
            grads.emplace_back(kDtypes[i % 3], sizes[i], draw);
            ms.emplace_back(FM_F32, sizes[i], draw, -0.1, 0.1);
            vs.emplace_back(FM_F32, sizes[i], draw, 0, 0.01);
        }
    }
    fm_status step(fm_status (*run)(fm_adamw_step_cpu_args*), const std::vector<int64_t>& sizes, int64_t step,
                   int threads) {
        std::vector<void*> p, g;
        std::vector<float*> m, v;
        std::vector<int32_t> dtypes;
        for (size_t i = 0; i < sizes.size(); ++i) {
            p.push_back(params[i].data()), g.push_back(grads[i].data()), m.push_back(ms[i].floats()),
                v.push_back(vs[i].floats());
            dtypes.push_back(params[i].dtype);
        }
        std::vector<int64_t> workspace(sizes.size() + 1);
        fm_adamw_step_cpu_args a{int64_t(sizes.size()),
                                 p.data(),
                                 g.data(),
                                 m.data(),
                                 v.data(),
                                 sizes.data(),
                                 dtypes.data(),
                                 step,
                                 1e-2,
                                 0.9,
                                 0.99,
                                 1e-8,
                                 0.1,
                                 0.5,
                                 workspace.data(),
                                 threads};
        return run(&a);
    }
    bool operator==(const List& o) const { return params == o.params && ms == o.ms && vs == o.vs; }
};

void check_list(const std::vector<int64_t>& sizes, int64_t step) {
    Draw draw;
    const List before(sizes, draw);
    const double correction1 = 1 - std::pow(0.9, double(step)), correction2 = 1 - std::pow(0.99, double(step));
    for (auto run : VARIANTS(fm_adamw_step_cpu)) {
        List after = before;
        CHECK(after.step(run, sizes, step, 1) == FM_OK);
        for (size_t i = 0; i < sizes.size(); ++i)
            for (int64_t j = 0; j < sizes[i]; ++j) {
                const double g = before.grads[i][j] * 0.5, m = before.ms[i][j] + 0.1 * (g - before.ms[i][j]);
                const double v = 0.99 * before.vs[i][j] + 0.01 * g * g;
                const double p =
                    before.params[i][j] * (1 - 1e-3) - 1e-2 / correction1 * m / (std::sqrt(v / correction2) + 1e-8);
                CHECK_NEAR(after.ms[i][j], m, 3e-7 * (std::fabs(m) + std::fabs(g)));
                CHECK_NEAR(after.vs[i][j], v, 3e-7 * v);
                CHECK_NEAR(after.params[i][j], p, epsilon(after.params[i].dtype) * std::fabs(p) + 3e-7);
            }
        for (int threads : {2, 3}) {
            List again = before;
            CHECK(again.step(run, sizes, step, threads) == FM_OK);
            CHECK(again == after);
        }
    }
}

void check_bad() {
    Draw draw;
    const std::vector<int64_t> sizes{3, 4};
    for (auto run : VARIANTS(fm_adamw_step_cpu)) {
        List list(sizes, draw);
        CHECK(list.step(run, sizes, 0, 1) == FM_BAD_VALUE);
        list.params[1].dtype = fm_dtype(3);
        CHECK(list.step(run, sizes, 1, 1) == FM_BAD_DTYPE);
    }
}

}  // namespace

int main() {
    check_list({}, 1);
    check_list({0}, 1);
    check_list({1}, 1);
    check_list({1, 0, 0, 16384, 16385, 21, 50001, 0}, 1);
    check_list({33, 16383, 7}, 101);
    check_list(std::vector<int64_t>(100, 5), 3);
    check_bad();
}
