#include "fastmoe/experts.h"

#include "check.h"
#include "fastmoe/permutation.h"

DECLARE_VARIANTS(fm_moe_mlp_cpu)
DECLARE_VARIANTS(fm_moe_mlp_backward_cpu)

namespace {

struct Case {
    int64_t T, K, E, D, F, R;
    fm_dtype dtype, weight_dtype;
    std::vector<int32_t> src, dst, offsets;
    Stored x, weights, gate_up, down, dy;

    Case(int64_t T, int64_t K, int64_t E, int64_t D, int64_t F, fm_dtype dtype, fm_dtype weight_dtype, bool one_expert,
         Draw draw)
        : T(T),
          K(K),
          E(E),
          D(D),
          F(F),
          R(T * K),
          dtype(dtype),
          weight_dtype(weight_dtype),
          src(size_t(R)),
          dst(size_t(R)),
          offsets(size_t(E + 1)),
          x(dtype, T * D, draw),
          weights(weight_dtype, R, draw, 0, 1),
          gate_up(dtype, E * 2 * F * D, draw, -0.5, 0.5),
          down(dtype, E * D * F, draw, -0.5, 0.5),
          dy(dtype, T * D, draw) {
        std::vector<int64_t> ids(src.size());
        for (int64_t& id : ids) id = one_expert ? E - 1 : draw.integer(E + 1) - 1;
        std::vector<int32_t> workspace(size_t(fm_build_routing_workspace(T, K, E)));
        fm_build_routing_cpu_args a{ids.data(),       1, T, K, E, -1, src.data(), dst.data(), offsets.data(),
                                    workspace.data(), 1, 0};
        CHECK(fm_build_routing_cpu(&a) == FM_OK);
    }
};

struct Exact {
    std::vector<double> z, y, dx, dweights, dgate_up, ddown;
};

Exact exact(const Case& c) {
    const size_t T = size_t(c.T), R = size_t(c.R), E = size_t(c.E), D = size_t(c.D), F = size_t(c.F), K = size_t(c.K);
    Exact o{std::vector<double>(R * 2 * F), std::vector<double>(T * D),         std::vector<double>(T * D),
            std::vector<double>(R),         std::vector<double>(E * 2 * F * D), std::vector<double>(E * D * F)};
    for (size_t e = 0; e < E; ++e)
        for (size_t r = size_t(c.offsets[e]); r < size_t(c.offsets[e + 1]); ++r) {
            const size_t s = size_t(c.src[r]), t = s / K;
            const double w = c.weights[int64_t(s)];
            std::vector<double> dz(2 * F);
            for (size_t n = 0; n < 2 * F; ++n)
                for (size_t d = 0; d < D; ++d)
                    o.z[r * 2 * F + n] += c.x[int64_t(t * D + d)] * c.gate_up[int64_t((e * 2 * F + n) * D + d)];
            for (size_t f = 0; f < F; ++f) {
                const double gate = o.z[r * 2 * F + f], up = o.z[r * 2 * F + F + f],
                             sigmoid = 1 / (1 + std::exp(-gate));
                const double act = gate * sigmoid * up;
                double dact = 0;
                for (size_t d = 0; d < D; ++d) {
                    const double down = c.down[int64_t((e * D + d) * F + f)], dy = c.dy[int64_t(t * D + d)];
                    o.y[t * D + d] += w * act * down;
                    o.dweights[s] += dy * act * down;
                    o.ddown[(e * D + d) * F + f] += w * dy * act;
                    dact += w * dy * down;
                }
                dz[f] = dact * up * sigmoid * (1 + gate * (1 - sigmoid));
                dz[F + f] = dact * gate * sigmoid;
            }
            for (size_t n = 0; n < 2 * F; ++n)
                for (size_t d = 0; d < D; ++d) {
                    o.dx[t * D + d] += dz[n] * c.gate_up[int64_t((e * 2 * F + n) * D + d)];
                    o.dgate_up[(e * 2 * F + n) * D + d] += dz[n] * c.x[int64_t(t * D + d)];
                }
        }
    return o;
}

// A workspace of exactly `bytes`, 64-byte aligned, full of NaN.
struct Workspace {
    void* data = nullptr;
    explicit Workspace(int64_t bytes) {
        CHECK(posix_memalign(&data, 64, size_t(bytes) + !bytes) == 0);
        std::memset(data, 0xff, size_t(bytes));
    }
    Workspace(const Workspace&) = delete;
    ~Workspace() { std::free(data); }
};

// Relative to the largest value: the sums have terms of both signs.
void check_all(const Stored& got, const std::vector<double>& want, double steps) {
    double top = 1e-3;
    for (double x : want) top = std::max(top, std::fabs(x));
    for (size_t i = 0; i < want.size(); ++i)
        CHECK_NEAR(got[int64_t(i)], want[i], (steps * epsilon(got.dtype) + 4e-6) * top);
}

struct Outputs {
    Stored y, z, dx, dweights, dgate_up, ddown;
    explicit Outputs(const Case& c)
        : y(c.dtype, c.T * c.D),
          z(c.dtype, c.R * 2 * c.F),
          dx(c.dtype, c.T * c.D),
          dweights(c.weight_dtype, c.R),
          dgate_up(c.dtype, c.E * 2 * c.F * c.D),
          ddown(c.dtype, c.E * c.D * c.F) {}
    bool operator==(const Outputs& o) const {
        return y == o.y && z == o.z && dx == o.dx && dweights == o.dweights && dgate_up == o.dgate_up &&
               ddown == o.ddown;
    }
};

void check_case(Case c) {
    const Exact want = exact(c);
    const auto forwards = VARIANTS(fm_moe_mlp_cpu);
    const auto backwards = VARIANTS(fm_moe_mlp_backward_cpu);
    for (size_t i = 0; i < forwards.size(); ++i) {
        Outputs first(c);
        for (int threads : {1, 2, 3}) {
            Outputs o(c);
            Stored unkept(c.dtype, c.T * c.D);
            Workspace memory(fm_moe_mlp_workspace(c.R, c.E, c.D, c.F, threads));
            fm_moe_mlp_cpu_args a{c.x.data(),
                                  c.weights.data(),
                                  c.src.data(),
                                  c.dst.data(),
                                  c.offsets.data(),
                                  c.gate_up.data(),
                                  c.down.data(),
                                  o.y.data(),
                                  o.z.data(),
                                  c.T,
                                  c.K,
                                  c.R,
                                  c.E,
                                  c.D,
                                  c.F,
                                  c.dtype,
                                  c.weight_dtype,
                                  memory.data,
                                  threads};
            CHECK(forwards[i](&a) == FM_OK);
            a.y_TD = unkept.data(), a.z_R2F = nullptr;
            CHECK(forwards[i](&a) == FM_OK && unkept == o.y);
            Workspace backward_memory(fm_moe_mlp_backward_workspace(c.R, c.E, c.D, c.F, threads));
            fm_moe_mlp_backward_cpu_args b{c.dy.data(),
                                           c.x.data(),
                                           c.weights.data(),
                                           c.src.data(),
                                           c.dst.data(),
                                           c.offsets.data(),
                                           c.gate_up.data(),
                                           c.down.data(),
                                           o.z.data(),
                                           o.dx.data(),
                                           o.dweights.data(),
                                           o.dgate_up.data(),
                                           o.ddown.data(),
                                           c.T,
                                           c.K,
                                           c.R,
                                           c.E,
                                           c.D,
                                           c.F,
                                           c.dtype,
                                           c.weight_dtype,
                                           backward_memory.data,
                                           threads};
            CHECK(backwards[i](&b) == FM_OK);
            if (threads == 1) first = o;
            CHECK(o == first);
            for (int skipped = 0; skipped < 4;
                 ++skipped) {  // one gradient at a time not wanted; the others stay the same
                Outputs part(c);
                b.dx_TD = skipped == 0 ? nullptr : part.dx.data();
                b.dweights_TK = skipped == 1 ? nullptr : part.dweights.data();
                b.dgate_up_E2FD = skipped == 2 ? nullptr : part.dgate_up.data();
                b.ddown_EDF = skipped == 3 ? nullptr : part.ddown.data();
                CHECK(backwards[i](&b) == FM_OK);
                CHECK(skipped == 0 || part.dx == o.dx);
                CHECK(skipped == 1 || part.dweights == o.dweights);
                CHECK(skipped == 2 || part.dgate_up == o.dgate_up);
                CHECK(skipped == 3 || part.ddown == o.ddown);
            }
        }
        std::vector<double> used_z(want.z.begin(), want.z.begin() + c.offsets[size_t(c.E)] * 2 * c.F);
        check_all(first.z, used_z, 1);
        check_all(first.y, want.y, 2);
        check_all(first.dx, want.dx, 4);
        check_all(first.dweights, want.dweights,
                  c.dtype == FM_F32 ? 1 : 4 * epsilon(c.dtype) / epsilon(c.weight_dtype));
        check_all(first.dgate_up, want.dgate_up, 4);
        check_all(first.ddown, want.ddown, 4);
    }
}

}  // namespace

int main() {
    const int64_t shapes[][5] = {
        {0, 2, 4, 8, 6}, {1, 1, 1, 1, 1}, {37, 3, 5, 19, 13}, {29, 1, 1, 24, 17}, {9, 2, 3, 100, 97}};
    for (const auto& s : shapes)
        for (fm_dtype dtype : kDtypes)
            for (fm_dtype weight_dtype : {FM_F32, dtype})
                check_case({s[0], s[1], s[2], s[3], s[4], dtype, weight_dtype, false, {}});
    check_case({70, 2, 3, 33, 50, FM_F32, FM_F32, true, {}});
    check_case({150, 2, 2, 200, 12, FM_F32, FM_F32, false, {}});
}
