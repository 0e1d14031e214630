#include "fastmoe/attention.h"

#include <algorithm>

#include "check.h"

DECLARE_VARIANTS(fm_attention_cpu)
DECLARE_VARIANTS(fm_attention_backward_cpu)
DECLARE_VARIANTS(fm_rope_cpu)
DECLARE_VARIANTS(fm_rope_backward_cpu)

namespace {

constexpr int64_t kBlock = FM_ATTENTION_BLOCK;

// What fm_attention points to, for a band of keys. A visited block is said to be whole when it is.
struct Layout {
    std::vector<int32_t> q_first{0}, q_entries, q_order, k_first{0}, k_entries, k_turn;
    Layout(int64_t Sq, int64_t Sk, int64_t low, int64_t high) {
        const int64_t q_blocks = (Sq + kBlock - 1) / kBlock, k_blocks = (Sk + kBlock - 1) / kBlock;
        std::vector<int32_t> count(static_cast<size_t>(q_blocks));
        const auto entry = [&](int64_t i, int64_t j) {  // -1: not visited
            bool some = false, all = true;
            for (int64_t q = i * kBlock; q < std::min(Sq, (i + 1) * kBlock); ++q)
                for (int64_t k = j * kBlock; k < std::min(Sk, (j + 1) * kBlock); ++k) {
                    const bool sees = q + low <= k && k <= q + high;
                    some |= sees, all &= sees;
                }
            return some ? int32_t(all) : -1;
        };
        for (int64_t i = 0; i < q_blocks; ++i) {
            for (int64_t j = 0; j < k_blocks; ++j)
                if (entry(i, j) >= 0) q_entries.push_back(int32_t(2 * j) + entry(i, j));
            q_first.push_back(int32_t(q_entries.size()));
            q_order.push_back(int32_t(q_blocks - 1 - i));
        }
        for (int64_t j = 0; j < k_blocks; ++j) {
            for (int64_t i = 0; i < q_blocks; ++i)
                if (entry(i, j) >= 0) {
                    k_entries.push_back(int32_t(2 * i) + entry(i, j));
                    k_turn.push_back(count[size_t(i)]++);
                }
            k_first.push_back(int32_t(k_entries.size()));
        }
    }
};

struct Shape {
    int64_t B, N, M, Sq, Sk, H, left, right;
};

// x[b, s, n, h] of a dense [B, S, N, H], with room for `gap` heads between tokens.
fm_heads heads_of(Stored& x, int64_t S, int64_t N, int64_t H, int64_t gap) {
    return {x.data(), S * (N + gap) * H, H, (N + gap) * H};
}

void check_shape(fm_dtype dtype, const Shape& s) {
    Draw draw;
    const int64_t low = s.Sk - s.Sq - s.left, high = s.Sk - s.Sq + s.right, gap = 1, each = s.N / s.M;
    const float scale = 0.6f / std::sqrt(float(s.H));
    Stored q(dtype, s.B * s.Sq * (s.N + gap) * s.H, draw), k(dtype, s.B * s.Sk * (s.M + gap) * s.H, draw),
        v(dtype, s.B * s.Sk * (s.M + gap) * s.H, draw), dout(dtype, s.B * s.Sq * (s.N + gap) * s.H, draw),
        dlse(FM_F32, s.B * s.N * s.Sq, draw);
    const auto at = [&](int64_t b, int64_t t, int64_t S, int64_t n, int64_t N) { return ((b * S + t) * N + n) * s.H; };
    const Layout lists(s.Sq, s.Sk, low, high);
    const size_t queries = size_t(s.B * s.Sq * s.N * s.H), keys = size_t(s.B * s.Sk * s.M * s.H);
    std::vector<double> out(queries), lse(size_t(s.B * s.N * s.Sq)), dq(queries), dk(keys), dv(keys);
    std::vector<double> p(static_cast<size_t>(s.Sk));
    for (int64_t b = 0; b < s.B; ++b)
        for (int64_t n = 0; n < s.N; ++n)
            for (int64_t i = 0; i < s.Sq; ++i) {
                const int64_t m = n / each, qi = at(b, i, s.Sq, n, s.N + gap), oi = at(b, i, s.Sq, n, s.N);
                double total = 0, delta = -dlse[(b * s.N + n) * s.Sq + i];
                for (int64_t j = 0; j < s.Sk; ++j) {
                    double score = 0;
                    for (int64_t h = 0; h < s.H; ++h) score += q[qi + h] * k[at(b, j, s.Sk, m, s.M + gap) + h];
                    p[size_t(j)] = i + low <= j && j <= i + high ? std::exp(score * scale) : 0;
                    total += p[size_t(j)];
                }
                lse[size_t((b * s.N + n) * s.Sq + i)] = std::log(total);
                for (int64_t j = 0; j < s.Sk && total > 0; ++j)
                    for (int64_t h = 0; h < s.H; ++h)
                        out[size_t(oi + h)] += p[size_t(j)] / total * v[at(b, j, s.Sk, m, s.M + gap) + h];
                for (int64_t h = 0; h < s.H; ++h) delta += dout[qi + h] * out[size_t(oi + h)];
                for (int64_t j = 0; j < s.Sk && total > 0; ++j) {
                    const int64_t kj = at(b, j, s.Sk, m, s.M + gap), to = at(b, j, s.Sk, m, s.M);
                    double dp = 0;
                    for (int64_t h = 0; h < s.H; ++h) dp += dout[qi + h] * v[kj + h];
                    const double weight = p[size_t(j)] / total, ds = weight * (dp - delta) * scale;
                    for (int64_t h = 0; h < s.H; ++h) {
                        dq[size_t(oi + h)] += ds * k[kj + h];
                        dk[size_t(to + h)] += ds * q[qi + h];
                        dv[size_t(to + h)] += weight * dout[qi + h];
                    }
                }
            }
    const auto near = [&](const Stored& got, const std::vector<double>& want, double tolerance) {
        for (size_t i = 0; i < want.size(); ++i)
            CHECK_NEAR(got[int64_t(i)], want[i], tolerance * (1 + std::fabs(want[i])));
    };
    fm_attention layer{s.B,
                       s.N,
                       s.M,
                       s.Sq,
                       s.Sk,
                       s.H,
                       low,
                       high,
                       scale,
                       FM_F32,
                       3,
                       lists.q_first.data(),
                       lists.q_entries.data(),
                       lists.q_order.data(),
                       lists.k_first.data(),
                       lists.k_entries.data(),
                       lists.k_turn.data()};
    const int64_t room = fm_attention_workspace(&layer), backward_room = fm_attention_backward_workspace(&layer);
    layer.dtype = dtype;
    CHECK(fm_attention_workspace(&layer) <= room && fm_attention_backward_workspace(&layer) <= backward_room);
    const double tolerance = dtype == FM_F32 ? 4e-6 : 3 * epsilon(dtype);
    Stored y(dtype, 0), got_lse(FM_F32, 0);
    const fm_heads heads[] = {heads_of(q, s.Sq, s.N, s.H, gap), heads_of(k, s.Sk, s.M, s.H, gap),
                              heads_of(v, s.Sk, s.M, s.H, gap)};
    for (auto run : VARIANTS(fm_attention_cpu)) {
        for (int threads : {1, 2, 3}) {
            Stored out_now(dtype, int64_t(queries)), lse_now(FM_F32, int64_t(lse.size()));
            std::vector<float> workspace(size_t(room / 4) + 16, NAN);
            layer.num_threads = threads;
            fm_attention_cpu_args a{layer,          heads[0],         heads[1],        heads[2],
                                    out_now.data(), lse_now.floats(), workspace.data()};
            CHECK(run(&a) == FM_OK);
            if (threads == 1) {
                y = out_now, got_lse = lse_now;
                near(y, out, tolerance);
                for (size_t i = 0; i < lse.size(); ++i)
                    CHECK(got_lse[int64_t(i)] == lse[i] ||
                          std::fabs(got_lse[int64_t(i)] - lse[i]) < 1e-5 * (1 + std::fabs(lse[i])));
            }
            CHECK(out_now == y && lse_now == got_lse);
        }
    }
    for (auto run : VARIANTS(fm_attention_backward_cpu)) {
        Stored first_q(dtype, 0), first_k(dtype, 0), first_v(dtype, 0);
        for (int threads : {1, 2, 3}) {
            Stored dq_now(dtype, int64_t(queries)), dk_now(dtype, int64_t(keys)), dv_now(dtype, int64_t(keys));
            std::vector<float> workspace(size_t(backward_room / 4) + 16, NAN);
            layer.num_threads = threads;
            fm_attention_backward_cpu_args a{layer,         heads_of(dout, s.Sq, s.N, s.H, gap),
                                             dlse.floats(), heads[0],
                                             heads[1],      heads[2],
                                             y.data(),      got_lse.floats(),
                                             dq_now.data(), dk_now.data(),
                                             dv_now.data(), workspace.data()};
            CHECK(run(&a) == FM_OK);
            if (threads == 1) {
                first_q = dq_now, first_k = dk_now, first_v = dv_now;
                near(first_q, dq, 4 * tolerance), near(first_k, dk, 4 * tolerance), near(first_v, dv, 4 * tolerance);
            }
            CHECK(dq_now == first_q && dk_now == first_k && dv_now == first_v);
        }
    }
}

void check_rope(fm_dtype dtype, int64_t B, int64_t S, int64_t N, int64_t M, int64_t H) {
    Draw draw;
    const int64_t A = N + 2 * M, half = H / 2;
    Stored qkv(dtype, B * S * A * H, draw), table(FM_F32, S * H);
    for (int64_t s = 0; s < S; ++s)
        for (int64_t h = 0; h < half; ++h) {
            const double angle = double(s + 3) * std::pow(100., -double(h) / double(half));
            table.set(s * H + h, std::cos(angle)), table.set(s * H + half + h, std::sin(angle));
        }
    for (auto run : VARIANTS(fm_rope_cpu))
        for (int threads : {1, 2, 3}) {
            Stored q(dtype, B * S * N * H), k(dtype, B * S * M * H), v(dtype, B * S * M * H),
                again(dtype, B * S * A * H);
            fm_rope_cpu_args a{B, S, N, M, H, dtype, threads, qkv.data(), table.floats(), q.data(), k.data(), v.data()};
            CHECK(run(&a) == FM_OK);
            for (int64_t i = 0; i < B * S * A * H; ++i) {
                const int64_t row = i / H / A, n = i / H % A, h = i % H, other = h < half ? i + half : i - half;
                const int64_t angle = row % S * H + h % half;
                const double turned = qkv[i] * table[angle] + (h < half ? -1 : 1) * qkv[other] * table[angle + half];
                const double got = n < N       ? q[(row * N + n) * H + h]
                                   : n < N + M ? k[(row * M + n - N) * H + h]
                                               : v[(row * M + n - N - M) * H + h];
                CHECK_NEAR(got, n < N + M ? turned : qkv[i], epsilon(dtype) * (1 + std::fabs(turned)));
            }
            // Turning back gives what came.
            for (auto back : VARIANTS(fm_rope_backward_cpu)) {
                fm_rope_backward_cpu_args b{B,
                                            S,
                                            N,
                                            M,
                                            H,
                                            dtype,
                                            threads,
                                            heads_of(q, S, N, H, 0),
                                            heads_of(k, S, M, H, 0),
                                            heads_of(v, S, M, H, 0),
                                            table.floats(),
                                            again.data()};
                CHECK(back(&b) == FM_OK);
                for (int64_t i = 0; i < B * S * A * H; ++i) CHECK_NEAR(again[i], qkv[i], 8 * epsilon(dtype));
            }
        }
}

void check_bad() {
    for (auto run : VARIANTS(fm_attention_cpu)) {
        fm_attention_cpu_args a{};
        a.layer.dtype = fm_dtype(3);
        CHECK(run(&a) == FM_BAD_DTYPE);
    }
    for (auto run : VARIANTS(fm_attention_backward_cpu)) {
        fm_attention_backward_cpu_args a{};
        a.layer.dtype = fm_dtype(3);
        CHECK(run(&a) == FM_BAD_DTYPE);
    }
    for (auto run : VARIANTS(fm_rope_cpu)) {
        fm_rope_cpu_args a{};
        a.dtype = fm_dtype(3);
        CHECK(run(&a) == FM_BAD_DTYPE);
    }
    for (auto run : VARIANTS(fm_rope_backward_cpu)) {
        fm_rope_backward_cpu_args a{};
        a.dtype = fm_dtype(3);
        CHECK(run(&a) == FM_BAD_DTYPE);
    }
}

}  // namespace

int main() {
    const Shape shapes[] = {
        {0, 2, 2, 4, 4, 8, 9, 0},      {1, 1, 1, 0, 4, 8, 9, 0},       {1, 2, 1, 4, 0, 8, 9, 9},
        {1, 1, 1, 1, 1, 1, 0, 0},      {2, 4, 2, 37, 37, 19, 400, 0},  {1, 2, 2, 7, 150, 33, 400, 400},
        {1, 2, 1, 150, 70, 8, 400, 0}, {1, 2, 2, 200, 200, 17, 40, 3}, {1, 1, 1, 130, 130, 65, 0, 0},
        {1, 1, 1, 70, 20, 256, 3, 90}, {1, 2, 2, 300, 300, 6, 400, 0},
    };
    for (const Shape& shape : shapes)
        for (fm_dtype dtype : kDtypes) check_shape(dtype, shape);
    for (fm_dtype dtype : kDtypes) check_rope(dtype, 2, 5, 3, 2, 38), check_rope(dtype, 1, 70, 4, 1, 64);
    check_bad();
}
