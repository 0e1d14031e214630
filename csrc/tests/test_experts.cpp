#include "fastmoe/experts.h"

#include "check.h"
#include "fastmoe/permutation.h"

DECLARE_VARIANTS(fm_moe_mlp_cpu)
DECLARE_VARIANTS(fm_moe_mlp_backward_cpu)

namespace {

// How the weights lie and what is kept between forward and backward.
struct How {
    bool interleaved, transposed, biases, sparse;
    fm_save save;
};

struct Case {
    int64_t T, K, E, D, F, R;
    fm_dtype dtype, weight_dtype;
    How how;
    std::vector<int32_t> src, dst, offsets;
    Stored x, weights, gate_up, down, gate_up_bias, down_bias, dy;

    Case(int64_t T, int64_t K, int64_t E, int64_t D, int64_t F, fm_dtype dtype, fm_dtype weight_dtype, bool one_expert,
         How how, Draw draw)
        : T(T),
          K(K),
          E(E),
          D(D),
          F(F),
          R(T * K),
          dtype(dtype),
          weight_dtype(weight_dtype),
          how(how),
          src(size_t(R)),
          dst(size_t(R)),
          offsets(size_t(E + 1)),
          x(dtype, T * D, draw),
          weights(weight_dtype, R, draw, 0, 1),
          gate_up(dtype, E * 2 * F * D, draw, -0.5, 0.5),
          down(dtype, E * D * F, draw, -0.5, 0.5),
          gate_up_bias(dtype, E * 2 * F, draw, -0.5, 0.5),
          down_bias(dtype, E * D, draw, -0.5, 0.5),
          dy(dtype, T * D, draw) {
        std::vector<int64_t> ids(src.size());
        for (int64_t& id : ids) id = one_expert ? E - 1 : draw.integer(E + 1) - 1;
        std::vector<int32_t> workspace(size_t(fm_build_routing_workspace(T, K, E)));
        fm_build_routing_cpu_args a{ids.data(),       1, T, K, E, -1, src.data(), dst.data(), offsets.data(),
                                    workspace.data(), 1, 0};
        CHECK(fm_build_routing_cpu(&a) == FM_OK);
    }
    fm_moe_layer layer(int threads) const {
        return {T, K, R,        E,      D, F, dtype, weight_dtype, FM_SWIGLU, how.interleaved, how.transposed,
                0, 0, how.save, threads};
    }
    // The least that every variant asks for: only the CPU's own may keep rows in two bytes.
    fm_moe_layer roomy(int threads, bool own) const {
        fm_moe_layer l = layer(threads);
        if (!own && dtype == FM_BF16) l.dtype = FM_F16;
        return l;
    }
    size_t z_at(bool up, size_t f) const { return how.interleaved ? 2 * f + up : up * size_t(F) + f; }
    size_t gate_up_at(size_t e, size_t n, size_t d) const {
        return how.transposed ? (e * size_t(D) + d) * 2 * size_t(F) + n : (e * 2 * size_t(F) + n) * size_t(D) + d;
    }
    size_t down_at(size_t e, size_t d, size_t f) const {
        return how.transposed ? (e * size_t(F) + f) * size_t(D) + d : (e * size_t(D) + d) * size_t(F) + f;
    }
};

struct Exact {
    std::vector<double> z, y, dx, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias;
};

Exact exact(const Case& c) {
    const size_t T = size_t(c.T), R = size_t(c.R), E = size_t(c.E), D = size_t(c.D), F = size_t(c.F), K = size_t(c.K);
    const auto zeros = [](size_t n) { return std::vector<double>(n); };
    Exact o{zeros(R * 2 * F),     zeros(T * D),     zeros(T * D),     zeros(R),
            zeros(E * 2 * F * D), zeros(E * D * F), zeros(E * 2 * F), zeros(E * D)};
    for (size_t e = 0; e < E; ++e)
        for (size_t r = size_t(c.offsets[e]); r < size_t(c.offsets[e + 1]); ++r) {
            const size_t s = size_t(c.src[r]), t = s / K;
            const double w = c.weights[int64_t(s)];
            std::vector<double> dz(2 * F);
            for (size_t n = 0; n < 2 * F; ++n) {
                if (c.how.biases) o.z[r * 2 * F + n] = c.gate_up_bias[int64_t(e * 2 * F + n)];
                for (size_t d = 0; d < D; ++d)
                    o.z[r * 2 * F + n] += c.x[int64_t(t * D + d)] * c.gate_up[int64_t(c.gate_up_at(e, n, d))];
            }
            for (size_t d = 0; c.how.biases && d < D; ++d) {
                const double dy = c.dy[int64_t(t * D + d)], bias = c.down_bias[int64_t(e * D + d)];
                o.y[t * D + d] += w * bias;
                o.dweights[s] += dy * bias;
                o.ddown_bias[e * D + d] += w * dy;
            }
            for (size_t f = 0; f < F; ++f) {
                const double gate = o.z[r * 2 * F + c.z_at(false, f)], up = o.z[r * 2 * F + c.z_at(true, f)],
                             sigmoid = 1 / (1 + std::exp(-gate));
                const double act = gate * sigmoid * up;
                double dact = 0;
                for (size_t d = 0; d < D; ++d) {
                    const double down = c.down[int64_t(c.down_at(e, d, f))], dy = c.dy[int64_t(t * D + d)];
                    o.y[t * D + d] += w * act * down;
                    o.dweights[s] += dy * act * down;
                    o.ddown[c.down_at(e, d, f)] += w * dy * act;
                    dact += w * dy * down;
                }
                dz[c.z_at(false, f)] = dact * up * sigmoid * (1 + gate * (1 - sigmoid));
                dz[c.z_at(true, f)] = dact * gate * sigmoid;
            }
            for (size_t n = 0; n < 2 * F; ++n) {
                o.dgate_up_bias[e * 2 * F + n] += dz[n];
                for (size_t d = 0; d < D; ++d) {
                    o.dx[t * D + d] += dz[n] * c.gate_up[int64_t(c.gate_up_at(e, n, d))];
                    o.dgate_up[c.gate_up_at(e, n, d)] += dz[n] * c.x[int64_t(t * D + d)];
                }
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

// The experts' slices of a gradient, all of them or those with rows.
std::vector<double> held(const Case& c, const std::vector<double>& all) {
    if (!c.how.sparse) return all;
    std::vector<double> rows;
    const size_t each = all.size() / size_t(c.E);
    for (size_t e = 0; e < size_t(c.E); ++e)
        if (c.offsets[e + 1] > c.offsets[e])
            rows.insert(rows.end(), all.begin() + int64_t(e * each), all.begin() + int64_t((e + 1) * each));
    return rows;
}

struct Outputs {
    std::vector<int8_t> z8;
    Stored y, z, scale, dx, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias;
    Outputs(const Case& c, int64_t experts)
        : z8(size_t(c.how.save == FM_SAVE_Z8 ? c.R * 2 * c.F : 0)),
          y(c.dtype, c.T * c.D),
          z(c.dtype, c.how.save == FM_SAVE_Z ? c.R * 2 * c.F : 0),
          scale(FM_BF16, c.how.save == FM_SAVE_Z8 ? c.R * 2 * ((c.F + FM_Z8_BLOCK - 1) / FM_Z8_BLOCK) : 0),
          dx(c.dtype, c.T * c.D),
          dweights(c.weight_dtype, c.R),
          dgate_up(c.dtype, experts * 2 * c.F * c.D),
          ddown(c.dtype, experts * c.D * c.F),
          dgate_up_bias(c.dtype, c.how.biases ? c.E * 2 * c.F : 0),
          ddown_bias(c.dtype, c.how.biases ? c.E * c.D : 0) {}
    void* kept_z(const Case& c) { return c.how.save == FM_SAVE_Z8 ? static_cast<void*>(z8.data()) : z.data(); }
    bool operator==(const Outputs& o) const {
        return z8 == o.z8 && y == o.y && z == o.z && scale == o.scale && dx == o.dx && dweights == o.dweights &&
               dgate_up == o.dgate_up && ddown == o.ddown && dgate_up_bias == o.dgate_up_bias &&
               ddown_bias == o.ddown_bias;
    }
};

void check_case(Case c) {
    const Exact want = exact(c);
    const auto forwards = VARIANTS(fm_moe_mlp_cpu);
    const auto backwards = VARIANTS(fm_moe_mlp_backward_cpu);
    const int64_t experts = c.E ? int64_t(held(c, std::vector<double>(size_t(c.E))).size()) : 0;
    for (size_t i = 0; i < forwards.size(); ++i) {
        Outputs first(c, experts);
        for (int threads : {1, 2, 3}) {
            Outputs o(c, experts);
            Stored unkept(c.dtype, c.T * c.D);
            const fm_moe_layer layer = c.layer(threads), roomy = c.roomy(threads, i == 0);
            void *gate_up_bias = c.how.biases ? c.gate_up_bias.data() : nullptr,
                 *down_bias = c.how.biases ? c.down_bias.data() : nullptr;
            Workspace memory(fm_moe_mlp_workspace(&roomy));
            fm_moe_mlp_cpu_args a{layer,          c.x.data(),       c.weights.data(), c.src.data(),
                                  c.dst.data(),   c.offsets.data(), c.gate_up.data(), c.down.data(),
                                  gate_up_bias,   down_bias,        o.y.data(),       o.kept_z(c),
                                  o.scale.data(), memory.data};
            CHECK(forwards[i](&a) == FM_OK);
            a.y_TD = unkept.data(), a.z_RZ = nullptr, a.z_scale = nullptr, a.layer.save = FM_SAVE_NONE;
            CHECK(forwards[i](&a) == FM_OK && unkept == o.y);
            Workspace backward_memory(fm_moe_mlp_backward_workspace(&roomy));
            void* bias_out[] = {c.how.biases ? o.dgate_up_bias.data() : nullptr,
                                c.how.biases ? o.ddown_bias.data() : nullptr};
            fm_moe_mlp_backward_cpu_args b{layer,
                                           c.dy.data(),
                                           c.x.data(),
                                           c.weights.data(),
                                           c.src.data(),
                                           c.dst.data(),
                                           c.offsets.data(),
                                           c.gate_up.data(),
                                           c.down.data(),
                                           gate_up_bias,
                                           down_bias,
                                           o.kept_z(c),
                                           o.scale.data(),
                                           c.how.sparse,
                                           o.dx.data(),
                                           o.dweights.data(),
                                           o.dgate_up.data(),
                                           o.ddown.data(),
                                           bias_out[0],
                                           bias_out[1],
                                           backward_memory.data};
            CHECK(backwards[i](&b) == FM_OK);
            if (threads == 1) first = o;
            CHECK(o == first);
            for (int skipped = 0; skipped < 4;
                 ++skipped) {  // one gradient at a time not wanted; the others stay the same
                Outputs part(c, experts);
                b.dx_TD = skipped == 0 ? nullptr : part.dx.data();
                b.dweights_TK = skipped == 1 ? nullptr : part.dweights.data();
                b.dgate_up = skipped == 2 ? nullptr : part.dgate_up.data();
                b.ddown = skipped == 3 ? nullptr : part.ddown.data();
                b.dgate_up_bias = b.ddown_bias = nullptr;
                CHECK(backwards[i](&b) == FM_OK);
                CHECK(skipped == 0 || part.dx == o.dx);
                CHECK(skipped == 1 || part.dweights == o.dweights);
                CHECK(skipped == 2 || part.dgate_up == o.dgate_up);
                CHECK(skipped == 3 || part.ddown == o.ddown);
            }
        }
        std::vector<double> used_z(want.z.begin(), want.z.begin() + c.offsets[size_t(c.E)] * 2 * c.F);
        if (c.how.save == FM_SAVE_Z) check_all(first.z, used_z, 1);
        check_all(first.y, want.y, 2);
        // 8-bit z: half a step of 1/127 of the block's largest, twice for two factors
        const double rounding = c.how.save == FM_SAVE_Z8 ? 0.03 / epsilon(c.dtype) : 0;
        check_all(first.dx, want.dx, 4 + rounding);
        check_all(first.dweights, want.dweights,
                  (c.dtype == FM_F32 ? 1 : 4 * epsilon(c.dtype) / epsilon(c.weight_dtype)) +
                      rounding * epsilon(c.dtype) / epsilon(c.weight_dtype));
        check_all(first.dgate_up, held(c, want.dgate_up), 4 + rounding);
        check_all(first.ddown, held(c, want.ddown), 4 + rounding);
        if (!c.how.biases) continue;
        check_all(first.dgate_up_bias, want.dgate_up_bias, 4 + rounding);
        check_all(first.ddown_bias, want.ddown_bias, 4);
    }
}

}  // namespace

int main() {
    const How plain{false, false, false, false, FM_SAVE_Z};
    const int64_t shapes[][5] = {
        {0, 2, 4, 8, 6}, {1, 1, 1, 1, 1}, {37, 3, 5, 19, 13}, {29, 1, 1, 24, 17}, {9, 2, 3, 100, 97}};
    for (const auto& s : shapes)
        for (fm_dtype dtype : kDtypes)
            for (fm_dtype weight_dtype : {FM_F32, dtype})
                check_case({s[0], s[1], s[2], s[3], s[4], dtype, weight_dtype, false, plain, {}});
    check_case({70, 2, 3, 33, 50, FM_F32, FM_F32, true, plain, {}});
    check_case({150, 2, 2, 200, 12, FM_F32, FM_F32, false, plain, {}});
    const How hows[] = {{true, false, true, false, FM_SAVE_X},
                        {false, true, false, true, FM_SAVE_Z},
                        {true, true, true, true, FM_SAVE_Z8},
                        {false, false, true, true, FM_SAVE_Z8}};
    for (const How& how : hows)
        for (fm_dtype dtype : kDtypes) {
            check_case({37, 3, 5, 19, 13, dtype, FM_F32, false, how, {}});
            check_case({20, 2, 7, 70, 131, dtype, dtype, false, how, {}});
            check_case({60, 1, 1, 21, 40, dtype, dtype, false, how, {}});
            check_case({0, 1, 2, 5, 5, dtype, dtype, false, how, {}});
        }
}
