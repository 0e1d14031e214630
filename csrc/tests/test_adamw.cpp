#include "fastmoe/adamw.h"

#include "check.h"

DECLARE_VARIANTS(fm_adamw_step_cpu)

namespace {

constexpr double kGradScale = 0.5, kLr = 1e-2, kBeta1 = 0.9, kBeta2 = 0.99, kDecay = 1 - 1e-3;

// One tensor of rows x columns with states of one kind, in heap blocks of exactly their size.
struct Entry {
    int64_t rows, columns;
    int32_t moments;  // fm_moments
    fm_master master;
    Stored param, grad, m, v, m_scale, v_scale, master_weight;
    std::vector<int8_t> m_codes, residual;
    std::vector<uint8_t> v_codes;

    bool coded() const { return moments == FM_MOMENTS_CODES; }
    bool rooted() const { return coded() || moments == FM_MOMENTS_F16; }
    int64_t numel() const { return rows * columns; }
    int64_t blocks() const { return (columns + 31) / 32; }

    Entry(int64_t rows, int64_t columns, fm_dtype dtype, int32_t moments, fm_master master, Draw& draw)
        : rows(rows),
          columns(columns),
          moments(moments),
          master(master),
          param(dtype, rows * columns, draw),
          grad(dtype, rows * columns, draw),
          m(coded() ? FM_F32 : fm_dtype(moments), coded() ? 0 : numel(), draw, -0.1, 0.1),
          v(coded() ? FM_F32 : fm_dtype(moments), coded() ? 0 : numel(), draw, 0, 0.01),
          m_scale(FM_BF16, coded() ? rows * blocks() : 0, draw, 0.05, 0.1),
          v_scale(FM_BF16, coded() ? rows * blocks() : 0, draw, 0.05, 0.1),
          master_weight(FM_F32, master == FM_MASTER_F32 ? numel() : 0, draw),
          m_codes(coded() ? numel() : 0),
          residual(master == FM_MASTER_RESIDUAL ? numel() : 0),
          v_codes(coded() ? numel() : 0) {
        for (auto& code : m_codes) code = int8_t(draw.integer(255) - 127);
        for (auto& code : v_codes) code = uint8_t(draw.integer(256));
        for (auto& part : residual) part = int8_t(draw.integer(256) - 128);
    }
    double weight(int64_t j) const {
        if (master == FM_MASTER_F32) return master_weight[j];
        if (master == FM_NO_MASTER) return param[j];
        const float high = float(param[j]);
        uint32_t word;
        std::memcpy(&word, &high, 4);
        word += uint32_t(int32_t(residual[j])) << 8;
        float whole;
        std::memcpy(&whole, &word, 4);
        return whole;
    }
    int64_t block(int64_t j) const { return j / columns * blocks() + j % columns / 32; }
    double mean(int64_t j) const {
        if (!coded()) return m[j];
        const double part = m_codes[j] / 127.0;
        return m_scale[block(j)] * part * std::fabs(part);
    }
    double kept(int64_t j) const {  // v or its root
        if (!coded()) return v[j];
        const double part = v_codes[j] / 255.0;
        return v_scale[block(j)] * part * part;
    }
    bool operator==(const Entry& o) const {
        return param == o.param && m == o.m && v == o.v && m_scale == o.m_scale && v_scale == o.v_scale &&
               master_weight == o.master_weight && m_codes == o.m_codes && v_codes == o.v_codes &&
               residual == o.residual;
    }
};

struct Numbers {
    std::vector<int64_t> steps, keys, first_rows;
    std::vector<double> decays;
    Numbers(size_t count, int64_t step) : steps(count, step), keys(count), first_rows(count), decays(count, kDecay) {
        for (size_t i = 0; i < count; ++i) keys[i] = int64_t(77 + i), first_rows[i] = int64_t(i);
    }
};

fm_status step(fm_status (*run)(fm_adamw_step_cpu_args*), std::vector<Entry>& list, const Numbers& n, int threads) {
    std::vector<void*> p, g, m, v, ms, vs, w;
    std::vector<int64_t> numels, columns, workspace(list.size() + 1);
    std::vector<int32_t> dtypes, moments, masters;
    for (Entry& e : list) {
        p.push_back(e.param.data()), g.push_back(e.grad.data());
        m.push_back(e.coded() ? e.m_codes.data() : e.m.data()), v.push_back(e.coded() ? e.v_codes.data() : e.v.data());
        ms.push_back(e.m_scale.data()), vs.push_back(e.v_scale.data());
        w.push_back(e.master == FM_MASTER_RESIDUAL ? e.residual.data() : e.master_weight.data());
        numels.push_back(e.numel()), columns.push_back(e.columns);
        dtypes.push_back(e.param.dtype), moments.push_back(e.moments), masters.push_back(e.master);
    }
    fm_adamw_step_cpu_args a{int64_t(list.size()),
                             p.data(),
                             g.data(),
                             m.data(),
                             v.data(),
                             ms.data(),
                             vs.data(),
                             w.data(),
                             numels.data(),
                             columns.data(),
                             dtypes.data(),
                             moments.data(),
                             masters.data(),
                             n.steps.data(),
                             n.keys.data(),
                             n.first_rows.data(),
                             n.decays.data(),
                             kLr,
                             kBeta1,
                             kBeta2,
                             1e-8,
                             kGradScale,
                             workspace.data(),
                             threads,
                             0};
    const fm_status status = run(&a);
    if (status == FM_BAD_VALUE) CHECK(a.bad == 0);
    return status;
}

double unit(double x, int bits, int least) {  // the step of a number of so many bits at x
    int exponent;
    std::frexp(x, &exponent);
    return std::ldexp(1.0, (exponent - 1 > least ? exponent - 1 : least) - bits);
}
double unit(double x, fm_dtype dtype) {
    return dtype == FM_F32 ? unit(x, 21, -126) : dtype == FM_F16 ? unit(x, 10, -14) : unit(x, 7, -126);
}

void check_entry(const Entry& before, const Entry& after, int64_t step) {
    const double correction1 = 1 - std::pow(kBeta1, double(step)), correction2 = 1 - std::pow(kBeta2, double(step));
    for (int64_t j = 0; j < before.numel(); ++j) {
        const double g = before.grad[j] * kGradScale, m = kBeta1 * before.mean(j) + (1 - kBeta1) * g;
        const double was = before.rooted() ? before.kept(j) * before.kept(j) : before.kept(j);
        const double v = kBeta2 * was + (1 - kBeta2) * g * g, kept = before.rooted() ? std::sqrt(v) : v;
        const double update = kLr / correction1 * m / (std::sqrt(v / correction2) + 1e-8);
        const double p = before.weight(j) * kDecay - update;
        if (before.coded()) {
            const double m_exact = 127 * std::sqrt(std::fabs(m) / after.m_scale[after.block(j)]);
            const double v_exact = 255 * std::sqrt(kept / after.v_scale[after.block(j)]);
            CHECK_NEAR(std::abs(after.m_codes[j]), m_exact, 1.01);
            CHECK_NEAR(after.v_codes[j], v_exact, 1.01);
            CHECK(after.m_codes[j] == 0 || (after.m_codes[j] > 0) == (m > 0));
            CHECK(after.v_codes[j] > 0 || kept == 0);
        } else {
            const fm_dtype dtype = fm_dtype(before.moments);
            CHECK_NEAR(after.m[j], m, 1.01 * unit(m, dtype) + 3e-7 * std::fabs(g));
            CHECK_NEAR(after.v[j], kept, 1.01 * unit(kept, dtype));
        }
        const double close = (before.moments == FM_MOMENTS_F32 ? 1e-6 : 1.3e-4) * std::fabs(update) + 3e-7;
        const double finest = before.master == FM_MASTER_F32        ? unit(p, FM_F32)
                              : before.master == FM_MASTER_RESIDUAL ? unit(p, 15, -126)
                                                                    : unit(p, before.param.dtype);
        CHECK_NEAR(after.weight(j), p, 1.01 * finest + close);
        if (before.master == FM_MASTER_F32) {
            Stored rounded(after.param.dtype, 1);
            rounded.set(0, after.weight(j));
            CHECK(rounded[0] == after.param[j]);
        }
    }
}

void check_list(const std::vector<std::pair<int64_t, int64_t>>& shapes, int64_t step_number) {
    Draw draw;
    std::vector<Entry> before;
    for (auto [rows, columns] : shapes)
        for (fm_dtype dtype : kDtypes)
            for (int moments = FM_MOMENTS_F32; moments <= FM_MOMENTS_CODES; ++moments)
                for (int master = FM_NO_MASTER; master <= FM_MASTER_RESIDUAL; ++master)
                    if (master == FM_NO_MASTER || dtype == FM_BF16 || (dtype == FM_F16 && master == FM_MASTER_F32))
                        before.emplace_back(rows, columns, dtype, moments, fm_master(master), draw);
    const Numbers numbers(before.size(), step_number);
    for (auto run : VARIANTS(fm_adamw_step_cpu)) {
        std::vector<Entry> after = before;
        CHECK(step(run, after, numbers, 1) == FM_OK);
        for (size_t i = 0; i < before.size(); ++i) check_entry(before[i], after[i], step_number);
        for (int threads : {2, 3}) {
            std::vector<Entry> again = before;
            CHECK(step(run, again, numbers, threads) == FM_OK);
            CHECK(again == after);
        }
    }
}

void check_bad() {
    Draw draw;
    for (auto run : VARIANTS(fm_adamw_step_cpu)) {
        std::vector<Entry> list{{1, 3, FM_F32, FM_MOMENTS_F32, FM_NO_MASTER, draw},
                                {2, 2, FM_BF16, FM_MOMENTS_F32, FM_NO_MASTER, draw}};
        CHECK(step(run, list, Numbers(2, 0), 1) == FM_BAD_VALUE);
        const Numbers good(2, 1);
        list[1].param.dtype = fm_dtype(3);
        CHECK(step(run, list, good, 1) == FM_BAD_DTYPE);
        list[1].param.dtype = FM_BF16, list[1].moments = 4;
        CHECK(step(run, list, good, 1) == FM_BAD_DTYPE);
        list[1].moments = FM_MOMENTS_F32, list[0].master = FM_MASTER_RESIDUAL;  // beside float32
        CHECK(step(run, list, good, 1) == FM_BAD_DTYPE);
    }
}

}  // namespace

int main() {
    check_list({}, 1);
    check_list({{0, 1}, {1, 1}, {3, 1}, {5, 33}, {2, 700}, {1, 16417}}, 1);
    check_list({{33, 7}, {2, 513}, {70, 257}}, 101);
    check_bad();
}
