#include "fastmoe/adafactor.h"

#include "check.h"

DECLARE_VARIANTS(fm_adafactor_step_cpu)

namespace {

constexpr double kBeta = 0.6, kRate = 0.01, kDecay = 0.1, kScale = 0.5, kClip = 0.5, kEps = 1e-30, kEpsWeight = 1e-3;

struct Shape {
    int64_t matrices, n, m; /* matrices -1: a vector [n, 1] */
    fm_dtype dtype;
    fm_master kind;
    int64_t stack() const { return matrices < 0 ? 1 : matrices; }
    int64_t size() const { return stack() * n * m; }
    bool rounds() const { return dtype != FM_F32 && kind == FM_NO_MASTER; }
};

struct List {
    std::vector<Stored> params, grads, rows, columns, squares, floats;
    std::vector<std::vector<int8_t>> residuals;

    List(const std::vector<Shape>& shapes, Draw& draw) {
        for (const Shape& s : shapes) {
            const bool vector = s.matrices < 0;
            params.emplace_back(s.dtype, s.size(), draw), grads.emplace_back(s.dtype, s.size(), draw);
            rows.emplace_back(FM_F32, vector ? 0 : s.stack() * s.n, draw, 0.5, 2);
            columns.emplace_back(FM_F32, vector ? 0 : s.stack() * s.m, draw, 0.5, 2);
            squares.emplace_back(FM_F32, vector ? s.size() : 0, draw, 0.5, 2);
            floats.emplace_back(FM_F32, s.kind == FM_MASTER_F32 ? s.size() : 0, draw);
            residuals.emplace_back(s.kind == FM_MASTER_RESIDUAL ? size_t(s.size()) : 0);
            for (int8_t& r : residuals.back()) r = int8_t(draw.integer(256) - 128);
        }
    }
    double weight(const Shape& s, size_t i, int64_t j) const {
        if (s.kind == FM_MASTER_F32) return floats[i][j];
        if (s.kind == FM_NO_MASTER) return params[i][j];
        const float high = float(params[i][j]);
        uint32_t bits;
        std::memcpy(&bits, &high, 4);
        bits += uint32_t(int32_t(residuals[i][size_t(j)])) << 8;
        float whole;
        std::memcpy(&whole, &bits, 4);
        return whole;
    }
    fm_status step(fm_status (*run)(fm_adafactor_step_cpu_args*), const std::vector<Shape>& shapes, bool scaled,
                   int threads) {
        const size_t count = shapes.size();
        std::vector<void*> p, g, w;
        std::vector<float*> r, c, v;
        std::vector<int64_t> sizes, keys, first_rows;
        std::vector<int32_t> dtypes, kinds;
        for (size_t i = 0; i < count; ++i) {
            const Shape& s = shapes[i];
            p.push_back(params[i].data()), g.push_back(grads[i].data());
            r.push_back(rows[i].floats()), c.push_back(columns[i].floats()), v.push_back(squares[i].floats());
            w.push_back(s.kind == FM_MASTER_RESIDUAL ? static_cast<void*>(residuals[i].data()) : floats[i].data());
            for (int64_t size : {s.matrices, s.n, s.m}) sizes.push_back(size);
            dtypes.push_back(params[i].dtype), kinds.push_back(s.kind);
            keys.push_back(int64_t(i)), first_rows.push_back(0);
        }
        const std::vector<double> betas(count, kBeta), rates(count, kRate);
        std::vector<char> workspace(size_t(fm_adafactor_step_workspace(int64_t(count), sizes.data(), threads)));
        fm_adafactor_step_cpu_args a{
            int64_t(count), p.data(),     g.data(),         r.data(),     c.data(),    v.data(),
            w.data(),       sizes.data(), dtypes.data(),    kinds.data(), keys.data(), first_rows.data(),
            betas.data(),   rates.data(), scaled,           kEps,         kEpsWeight,  kClip,
            kDecay,         kScale,       workspace.data(), threads};
        return run(&a);
    }
    bool operator==(const List& o) const {
        return params == o.params && rows == o.rows && columns == o.columns && squares == o.squares &&
               floats == o.floats && residuals == o.residuals;
    }
};

double rms(const std::vector<double>& x) {
    double sum = 0;
    for (double value : x) sum += value * value;
    return std::sqrt(sum / double(x.size()));
}

/* Matrix e of tensor i against the formula in double. */
void check_unit(const Shape& s, const List& before, const List& after, size_t i, int64_t e, bool scaled) {
    const int64_t n = s.n, m = s.m, first = e * n * m;
    std::vector<double> R(size_t(n), 0), C(size_t(m), 0), update, weights;
    double mean = 0;
    if (s.matrices >= 0) {
        for (int64_t r = 0; r < n; ++r)
            for (int64_t c = 0; c < m; ++c) {
                const double g = before.grads[i][first + r * m + c] * kScale;
                R[size_t(r)] += g * g / double(m), C[size_t(c)] += g * g / double(n);
            }
        for (int64_t r = 0; r < n; ++r) {
            R[size_t(r)] = kBeta * before.rows[i][e * n + r] + (1 - kBeta) * R[size_t(r)];
            mean += R[size_t(r)] / double(n);
            CHECK_NEAR(after.rows[i][e * n + r], R[size_t(r)], 1e-6 * R[size_t(r)]);
        }
        for (int64_t c = 0; c < m; ++c) {
            C[size_t(c)] = kBeta * before.columns[i][e * m + c] + (1 - kBeta) * C[size_t(c)];
            CHECK_NEAR(after.columns[i][e * m + c], C[size_t(c)], 1e-6 * C[size_t(c)]);
        }
    }
    for (int64_t j = 0; j < n * m; ++j) {
        const double g = before.grads[i][first + j] * kScale;
        double v;
        if (s.matrices < 0) {
            v = kBeta * before.squares[i][j] + (1 - kBeta) * g * g;
            CHECK_NEAR(after.squares[i][j], v, 1e-6 * v);
        } else {
            v = R[size_t(j / m)] * C[size_t(j % m)] / mean;
        }
        update.push_back(g / std::sqrt(v)), weights.push_back(before.weight(s, i, first + j));
    }
    const double rate = scaled ? kRate * std::fmax(kEpsWeight, rms(weights)) : kRate;
    const double excess = std::fmax(1, rms(update) / kClip);
    for (size_t j = 0; j < update.size(); ++j) {
        const double want = weights[j] * (1 - rate * kDecay) - rate * update[j] / excess;
        const double step = s.rounds() ? epsilon(s.dtype) : s.kind == FM_MASTER_RESIDUAL ? 3.1e-5 : 0;
        CHECK_NEAR(after.weight(s, i, first + int64_t(j)), want, step * std::fabs(want) + 1e-6);
        if (s.kind == FM_MASTER_F32) CHECK_NEAR(after.params[i][first + int64_t(j)], want, epsilon(s.dtype) * 2);
    }
}

void check_list(const std::vector<Shape>& shapes, bool scaled) {
    Draw draw;
    const List before(shapes, draw);
    for (auto run : VARIANTS(fm_adafactor_step_cpu)) {
        List after = before;
        CHECK(after.step(run, shapes, scaled, 1) == FM_OK);
        for (size_t i = 0; i < shapes.size(); ++i)
            for (int64_t e = 0; shapes[i].size() && e < shapes[i].stack(); ++e)
                check_unit(shapes[i], before, after, i, e, scaled);
        for (int threads : {2, 3}) {
            List again = before;
            CHECK(again.step(run, shapes, scaled, threads) == FM_OK);
            CHECK(again == after);
        }
    }
}

void check_bad() {
    Draw draw;
    for (auto run : VARIANTS(fm_adafactor_step_cpu)) {
        const std::vector<Shape> shapes{{1, 2, 3, FM_F16, FM_MASTER_RESIDUAL}}, other{{1, 2, 3, FM_F32, FM_NO_MASTER}};
        CHECK(List(shapes, draw).step(run, shapes, true, 1) == FM_BAD_DTYPE);
        List list(other, draw);
        list.params[0].dtype = fm_dtype(3);
        CHECK(list.step(run, other, true, 1) == FM_BAD_DTYPE);
    }
}

}  // namespace

int main() {
    check_list({}, true);
    for (bool scaled : {false, true}) {
        check_list({{1, 1, 1, FM_F32, FM_NO_MASTER}, {-1, 1, 1, FM_F32, FM_NO_MASTER}}, scaled);
        check_list({{3, 7, 21, FM_BF16, FM_NO_MASTER},
                    {0, 4, 5, FM_F32, FM_NO_MASTER},
                    {2, 0, 5, FM_F32, FM_NO_MASTER},
                    {2, 5, 0, FM_F32, FM_NO_MASTER},
                    {-1, 0, 1, FM_F32, FM_NO_MASTER},
                    {1, 70, 33, FM_F16, FM_NO_MASTER},
                    {-1, 37, 1, FM_BF16, FM_MASTER_RESIDUAL},
                    {2, 9, 40, FM_BF16, FM_MASTER_RESIDUAL},
                    {2, 9, 19, FM_BF16, FM_MASTER_F32},
                    {1, 6, 16, FM_F16, FM_MASTER_F32}},
                   scaled);
    }
    /* a vector of several tiles, wide and tall matrices, one that the team shares */
    check_list({{-1, 300001, 1, FM_F32, FM_NO_MASTER}, {1, 3, 20001, FM_F32, FM_NO_MASTER}}, true);
    check_list({{1, 5003, 3, FM_F32, FM_NO_MASTER}, {1, 700, 401, FM_F32, FM_NO_MASTER}}, true);
    check_bad();
}
