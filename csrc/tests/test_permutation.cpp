#include "fastmoe/permutation.h"

#include "check.h"

DECLARE_VARIANTS(fm_build_routing_cpu)
DECLARE_VARIANTS(fm_build_routing_from_experts_cpu)
DECLARE_VARIANTS(fm_permute_cpu)
DECLARE_VARIANTS(fm_unpermute_cpu)
DECLARE_VARIANTS(fm_unpermute_backward_cpu)

namespace {

struct Routing {
    std::vector<int32_t> src, dst, offsets;
    fm_status status = FM_OK;
    int64_t bad = 0;
    bool operator==(const Routing& o) const { return src == o.src && dst == o.dst && offsets == o.offsets; }
};

template <class Id>
Routing build(fm_status (*run)(fm_build_routing_cpu_args*), const std::vector<Id>& ids, int64_t T, int64_t K, int64_t E,
              int64_t capacity, int threads) {
    Routing r{std::vector<int32_t>(size_t(T * K), -9), std::vector<int32_t>(size_t(T * K), -9),
              std::vector<int32_t>(size_t(E + 1), -9)};
    std::vector<int32_t> workspace(size_t(fm_build_routing_workspace(T, K, E)), -9);
    fm_build_routing_cpu_args a{ids.data(),       sizeof(Id) == 8,  T,       K, E, capacity, r.src.data(), r.dst.data(),
                                r.offsets.data(), workspace.data(), threads, 0};
    r.status = run(&a);
    r.bad = a.bad;
    return r;
}

// Rows by expert, then by (t, k); under a capacity the slots of lower (k, t) stay.
template <class Id>
Routing plain(const std::vector<Id>& ids, int64_t T, int64_t K, int64_t E, int64_t capacity) {
    Routing r{std::vector<int32_t>(size_t(T * K), -1), std::vector<int32_t>(size_t(T * K), -1), {0}};
    int32_t row = 0;
    for (int64_t e = 0; e < E; ++e) {
        std::vector<char> kept(size_t(T * K));
        int64_t count = 0;
        for (int64_t k = 0; k < K; ++k)
            for (int64_t t = 0; t < T; ++t)
                if (ids[size_t(t * K + k)] == e && (capacity < 0 || count < capacity))
                    kept[size_t(t * K + k)] = 1, ++count;
        for (int64_t s = 0; s < T * K; ++s)
            if (kept[size_t(s)]) r.src[size_t(row)] = int32_t(s), r.dst[size_t(s)] = row++;
        r.offsets.push_back(row);
    }
    return r;
}

template <class Id>
std::vector<Id> draw_ids(int64_t T, int64_t K, int64_t E, Draw& draw) {
    std::vector<Id> ids(size_t(T * K));
    for (Id& id : ids) id = Id(draw.integer(E + 1) - 1);
    return ids;
}

template <class Id>
void check_build(int64_t T, int64_t K, int64_t E, int64_t capacity) {
    Draw draw;
    const std::vector<Id> ids = draw_ids<Id>(T, K, E, draw);
    const Routing want = plain(ids, T, K, E, capacity);
    for (auto run : VARIANTS(fm_build_routing_cpu))
        for (int threads : {1, 2, 3, 5}) {
            const Routing got = build(run, ids, T, K, E, capacity, threads);
            CHECK(got.status == FM_OK && got == want);
        }
    if (T * K == 0) return;
    for (auto run : VARIANTS(fm_build_routing_cpu))
        for (int64_t wrong : {int64_t(-2), E}) {
            std::vector<Id> bad = ids;
            bad[size_t(T * K - 1)] = Id(wrong);
            const Routing got = build(run, bad, T, K, E, capacity, 2);
            CHECK(got.status == FM_BAD_VALUE && got.bad == wrong);
        }
}

template <class Id>
void check_from_experts() {
    const int64_t T = 4, E = 3;
    const std::vector<int32_t> want_src{0 * 3 + 0, 2 * 3 + 0, 0 * 3 + 2, 1 * 3 + 2, 3 * 3 + 2};
    const std::vector<int32_t> want_dst{0, -1, 2, -1, -1, 3, 1, -1, -1, -1, -1, 4};
    for (auto run : VARIANTS(fm_build_routing_from_experts_cpu)) {
        const auto build = [&](std::vector<Id> tokens, std::vector<Id> offsets, Routing& r) {
            r = {std::vector<int32_t>(tokens.size()), std::vector<int32_t>(size_t(T * E)),
                 std::vector<int32_t>(size_t(E + 1))};
            fm_build_routing_from_experts_cpu_args a{tokens.data(),
                                                     sizeof(Id) == 8,
                                                     offsets.data(),
                                                     sizeof(Id) == 8,
                                                     int64_t(tokens.size()),
                                                     T,
                                                     E,
                                                     r.src.data(),
                                                     r.dst.data(),
                                                     r.offsets.data(),
                                                     0};
            r.status = run(&a);
            return a.bad;
        };
        Routing r;
        build({0, 2, 0, 1, 3}, {0, 2, 2, 5}, r);
        CHECK(r.status == FM_OK && r.src == want_src && r.dst == want_dst &&
              r.offsets == (std::vector<int32_t>{0, 2, 2, 5}));
        build({}, {0, 0, 0, 0}, r);
        CHECK(r.status == FM_OK && r.dst == std::vector<int32_t>(size_t(T * E), -1));
        CHECK(build({0, 2, 1, 1, 3}, {0, 2, 2, 5}, r) == 3 && r.status == FM_BAD_VALUE);  // twice one token
        CHECK(build({0, 4, 0, 1, 3}, {0, 2, 2, 5}, r) == 1 && r.status == FM_BAD_VALUE);
        CHECK(build({0, 2, 0, 1, 3}, {0, 3, 2, 5}, r) == -1 && r.status == FM_BAD_VALUE);
        CHECK(build({0, 2, 0, 1, 3}, {0, 2, 2, 4}, r) == -1 && r.status == FM_BAD_VALUE);
    }
}

void check_move(int64_t T, int64_t K, int64_t E, int64_t D, int64_t capacity) {
    Draw draw;
    const std::vector<int64_t> ids = draw_ids<int64_t>(T, K, E, draw);
    const Routing r = plain(ids, T, K, E, capacity);
    const int64_t R = T * K;
    for (int bytes : {2, 4, 8}) {
        std::vector<unsigned char> x(size_t(T * D * bytes)), zero(size_t(D * bytes));
        for (unsigned char& byte : x) byte = (unsigned char)(draw.bits());
        for (auto run : VARIANTS(fm_permute_cpu))
            for (int threads : {1, 3}) {
                std::vector<unsigned char> y(size_t(R * D * bytes), 0xff);
                fm_permute_cpu_args a{x.data(), r.src.data(), y.data(), R, D, K, bytes, threads};
                CHECK(run(&a) == FM_OK);
                for (int64_t row = 0; row < R; ++row) {
                    const int32_t s = r.src[size_t(row)];
                    const unsigned char* from = s < 0 ? zero.data() : x.data() + s / K * D * bytes;
                    CHECK(std::memcmp(y.data() + row * D * bytes, from, size_t(D * bytes)) == 0);
                }
            }
    }
    for (fm_dtype dtype : kDtypes)
        for (fm_dtype weight_dtype : {FM_F32, dtype}) {
            Stored y(dtype, R * D, draw), dout(dtype, T * D, draw), weights(weight_dtype, T * K, draw);
            for (int weighted : {0, 1})
                for (auto run : VARIANTS(fm_unpermute_cpu)) {
                    Stored first(dtype, 0);
                    for (int threads : {1, 2, 3}) {
                        Stored out(dtype, T * D);
                        fm_unpermute_cpu_args a{
                            y.data(),     r.dst.data(), weighted ? weights.data() : nullptr, out.data(), T, K, D, dtype,
                            weight_dtype, threads};
                        CHECK(run(&a) == FM_OK);
                        if (threads == 1) first = out;
                        CHECK(out == first);
                    }
                    for (int64_t i = 0; i < T * D; ++i) {
                        double want = 0;
                        for (int64_t k = 0; k < K; ++k) {
                            const int64_t slot = i / D * K + k, row = r.dst[size_t(slot)];
                            if (row >= 0) want += (weighted ? weights[slot] : 1) * y[row * D + i % D];
                        }
                        CHECK_NEAR(first[i], want, epsilon(dtype) * std::fabs(want) + 1e-6 * double(K));
                    }
                }
            for (auto run : VARIANTS(fm_unpermute_backward_cpu)) {
                Stored first(dtype, 0), first_dweights(weight_dtype, 0);
                for (int threads : {1, 2, 3}) {
                    Stored dy(dtype, R * D), dweights(weight_dtype, T * K);
                    fm_unpermute_backward_cpu_args a{dout.data(),
                                                     y.data(),
                                                     r.src.data(),
                                                     r.dst.data(),
                                                     weights.data(),
                                                     dy.data(),
                                                     dweights.data(),
                                                     R,
                                                     T,
                                                     K,
                                                     D,
                                                     dtype,
                                                     weight_dtype,
                                                     threads};
                    CHECK(run(&a) == FM_OK);
                    if (threads == 1) first = dy, first_dweights = dweights;
                    CHECK(dy == first && dweights == first_dweights);
                }
                for (int64_t row = 0; row < R; ++row)
                    for (int64_t d = 0; d < D; ++d) {
                        const int32_t s = r.src[size_t(row)];
                        const double want = s < 0 ? 0 : weights[s] * dout[s / K * D + d];
                        CHECK_NEAR(first[row * D + d], want, epsilon(dtype) * std::fabs(want) + 1e-7);
                    }
                for (int64_t s = 0; s < T * K; ++s) {
                    double want = 0;
                    for (int64_t d = 0; d < D && r.dst[size_t(s)] >= 0; ++d)
                        want += dout[s / K * D + d] * y[r.dst[size_t(s)] * D + d];
                    CHECK_NEAR(first_dweights[s], want, epsilon(weight_dtype) * std::fabs(want) + 1e-6 * double(D));
                }
            }
        }
}

}  // namespace

int main() {
    const int64_t shapes[][3] = {{0, 2, 4},    {1, 1, 1},    {5, 3, 7},    {29, 1, 1},
                                 {2100, 2, 5}, {700, 7, 64}, {9000, 2, 5}, {44000, 1, 5}};
    for (const auto& shape : shapes)
        for (int64_t capacity : {-1, 0, 3}) {
            check_build<int32_t>(shape[0], shape[1], shape[2], capacity);
            check_build<int64_t>(shape[0], shape[1], shape[2], capacity);
        }
    check_from_experts<int32_t>();
    check_from_experts<int64_t>();
    check_move(0, 2, 4, 8, -1);
    check_move(1, 1, 1, 1, -1);
    check_move(13, 3, 5, 19, -1);
    check_move(13, 3, 5, 64, 2);
    check_move(70, 2, 8, 37, -1);
}
