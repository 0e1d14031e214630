#include "fastmoe/gating.h"

#include <algorithm>

#include "check.h"

DECLARE_VARIANTS(fm_topk_gate_cpu)
DECLARE_VARIANTS(fm_topk_gate_backward_cpu)

namespace {

struct Options {
    int sigmoid, renormalize;
    int64_t num_groups = 1, top_groups = 1;
    int top2 = 0;
    double scale = 1;
    std::vector<float> bias = {};
};

struct Gate {
    int64_t T, E, K;
    Stored weights, probs;
    std::vector<int64_t> ids, load;
    int64_t bad = 0;
    fm_status status;

    Gate(fm_status (*run)(fm_topk_gate_cpu_args*), Stored& logits, int64_t T, int64_t E, int64_t K, const Options& o,
         int threads)
        : T(T), E(E), K(K), weights(FM_F32, T * K), probs(FM_F32, T * E), ids(size_t(T * K), -7), load(size_t(E), -7) {
        std::vector<float> workspace(size_t(fm_topk_gate_workspace(E, threads)), NAN);
        fm_topk_gate_cpu_args a{logits.data(),
                                o.bias.empty() ? nullptr : o.bias.data(),
                                T,
                                E,
                                K,
                                logits.dtype,
                                o.sigmoid,
                                o.renormalize,
                                o.num_groups,
                                o.top_groups,
                                o.top2,
                                o.scale,
                                weights.floats(),
                                ids.data(),
                                probs.floats(),
                                load.data(),
                                workspace.data(),
                                threads,
                                0};
        status = run(&a);
        bad = a.bad;
    }
    bool operator==(const Gate& o) const {
        return weights == o.weights && probs == o.probs && ids == o.ids && load == o.load;
    }
};

std::vector<double> scores(const Stored& logits, int64_t t, int64_t E, int sigmoid) {
    std::vector<double> p(static_cast<size_t>(E));
    double top = -INFINITY, total = 0;
    for (int64_t e = 0; e < E; ++e) top = std::max(top, logits[t * E + e]);
    for (int64_t e = 0; e < E; ++e) {
        const double z = logits[t * E + e];
        total += p[size_t(e)] = sigmoid ? 1 / (1 + std::exp(-z)) : std::exp(z - top);
    }
    if (!sigmoid)
        for (double& x : p) x /= total;
    return p;
}

/* Ranks are taken from the scores that the gate gives, as floats: choices are then exact. */
void check_forward(const Gate& gate, const Stored& logits, const Options& o) {
    const int64_t E = gate.E, K = gate.K, each = E / o.num_groups;
    std::vector<int64_t> load(static_cast<size_t>(E));
    CHECK(gate.status == FM_OK);
    for (int64_t t = 0; t < gate.T; ++t) {
        const std::vector<double> p = scores(logits, t, E, o.sigmoid);
        for (int64_t e = 0; e < E; ++e) CHECK_NEAR(gate.probs[t * E + e], p[size_t(e)], 5e-7);
        std::vector<float> rank, score;
        for (int64_t e = 0; e < E; ++e) {
            const float probability = float(gate.probs[t * E + e]);
            rank.push_back(o.bias.empty() ? float(logits[t * E + e]) : probability + o.bias[size_t(e)]);
            score.push_back(o.top2 && o.bias.empty() ? probability : rank.back());
        }
        std::vector<float> group;
        for (int64_t g = 0; g < o.num_groups; ++g) {
            std::vector<float> inside(score.begin() + g * each, score.begin() + (g + 1) * each);
            std::sort(inside.rbegin(), inside.rend());
            group.push_back(o.top2 ? inside[0] + inside[1] : inside[0]);
        }
        std::vector<int64_t> groups, order;
        for (int64_t g = 0; g < o.num_groups; ++g) groups.push_back(g);
        std::stable_sort(groups.begin(), groups.end(),
                         [&](int64_t a, int64_t b) { return group[size_t(a)] > group[size_t(b)]; });
        for (int64_t e = 0; e < E; ++e)
            if (std::find(groups.begin(), groups.begin() + o.top_groups, e / each) < groups.begin() + o.top_groups)
                order.push_back(e);
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t a, int64_t b) { return rank[size_t(a)] > rank[size_t(b)]; });
        double total = 1e-20;
        for (int64_t k = 0; k < K; ++k) total += p[size_t(order[size_t(k)])];
        for (int64_t k = 0; k < K; ++k) {
            const size_t id = size_t(order[size_t(k)]);
            CHECK(gate.ids[size_t(t * K + k)] == int64_t(id));
            CHECK_NEAR(gate.weights[t * K + k], p[id] / (o.renormalize ? total : 1) * o.scale, 5e-7 * o.scale);
            ++load[id];
        }
    }
    CHECK(gate.load == load);
}

struct Gradient {
    Stored dlogits;
    fm_status status;
    int64_t bad;

    Gradient(fm_status (*run)(fm_topk_gate_backward_cpu_args*), Gate& gate, Stored& dweights, Stored& dprobs,
             const Options& o, int threads)
        : dlogits(FM_F32, gate.T * gate.E) {
        fm_topk_gate_backward_cpu_args a{
            dweights.floats(), dprobs.floats(), gate.ids.data(), gate.probs.floats(), gate.T,  gate.E, gate.K,
            o.sigmoid,         o.renormalize,   o.scale,         dlogits.floats(),    threads, 0};
        status = run(&a);
        bad = a.bad;
    }
};

void check_backward(const Gradient& got, const Gate& gate, const Stored& logits, const Stored& dweights,
                    const Stored& dprobs, const Options& o) {
    const int64_t E = gate.E, K = gate.K;
    CHECK(got.status == FM_OK);
    for (int64_t t = 0; t < gate.T; ++t) {
        const std::vector<double> p = scores(logits, t, E, o.sigmoid);
        std::vector<double> g(static_cast<size_t>(E));
        double total = 0, dot = 0, mean = 0;
        for (int64_t e = 0; e < E; ++e) g[size_t(e)] = dprobs[t * E + e];
        for (int64_t k = 0; k < K; ++k) {
            total += p[size_t(gate.ids[size_t(t * K + k)])];
            dot += p[size_t(gate.ids[size_t(t * K + k)])] * dweights[t * K + k];
        }
        for (int64_t k = 0; k < K; ++k)
            g[size_t(gate.ids[size_t(t * K + k)])] +=
                o.scale * (o.renormalize ? (dweights[t * K + k] - dot / total) / total : dweights[t * K + k]);
        double largest = 1;
        for (int64_t e = 0; e < E; ++e) {
            mean += g[size_t(e)] * p[size_t(e)];
            largest = std::max(largest, std::fabs(g[size_t(e)] * p[size_t(e)]));
        }
        for (int64_t e = 0; e < E; ++e) {
            const double slope = o.sigmoid ? p[size_t(e)] * (1 - p[size_t(e)]) : p[size_t(e)];
            CHECK_NEAR(got.dlogits[t * E + e], slope * (g[size_t(e)] - (o.sigmoid ? 0 : mean)), 3e-6 * largest);
        }
    }
}

void check_options(int64_t T, int64_t E, int64_t K, fm_dtype dtype, const Options& o, Draw& draw) {
    Stored logits(dtype, T * E, draw, -8, 8), dweights(FM_F32, T * K, draw), dprobs(FM_F32, T * E, draw);
    for (int64_t i = 0; i < T * E; ++i)
        if (draw.integer(5) == 0) logits.set(i, draw.integer(2) ? 1.5 : i % E == 0 ? 0 : -INFINITY);
    for (int64_t t = 0; t < T; ++t) logits.set(t * E + draw.integer(E), 1.5);
    for (auto run : VARIANTS(fm_topk_gate_cpu)) {
        Gate gate(run, logits, T, E, K, o, 1);
        check_forward(gate, logits, o);
        for (int threads : {2, 3}) CHECK(gate == Gate(run, logits, T, E, K, o, threads));
    }
    Gate gate(fm_topk_gate_cpu, logits, T, E, K, o, 1);
    for (auto run : VARIANTS(fm_topk_gate_backward_cpu)) {
        Gradient gradient(run, gate, dweights, dprobs, o, 1);
        if (o.num_groups == 1) /* elsewhere a token may have no weight at all */
            check_backward(gradient, gate, logits, dweights, dprobs, o);
        for (int threads : {2, 3}) CHECK(gradient.dlogits == Gradient(run, gate, dweights, dprobs, o, threads).dlogits);
    }
}

void check_shape(int64_t T, int64_t E, int64_t K) {
    Draw draw;
    for (fm_dtype dtype : kDtypes)
        for (int sigmoid : {0, 1})
            for (int renormalize : {0, 1}) check_options(T, E, K, dtype, {sigmoid, renormalize, 1, 1, 0, 1.5}, draw);
}

void check_groups(int64_t T, int64_t E, int64_t K, int64_t num_groups, int64_t top_groups) {
    Draw draw;
    for (int sigmoid : {0, 1})
        for (int top2 : {0, 1})
            for (int biased : {0, 1}) {
                Options o{sigmoid, 1, num_groups, top_groups, top2, 2.5};
                for (int64_t e = 0; biased && e < E; ++e) o.bias.push_back(float(draw.integer(9) - 6) / 8);
                check_options(T, E, K, FM_F32, o, draw);
            }
}

void check_bad() {
    Draw draw;
    const int64_t T = 700, E = 18, K = 3;
    Stored dweights(FM_F32, T * K, draw), dprobs(FM_F32, T * E, draw), good(FM_F32, T * E, draw);
    const Options plain{0, 1};
    for (auto run : VARIANTS(fm_topk_gate_cpu)) {
        for (double value : {double(NAN), double(INFINITY)})
            for (int threads : {1, 3}) {
                Stored logits = good;
                logits.set(611 * E + 17, value);
                logits.set(690 * E, value);
                Gate gate(run, logits, T, E, K, plain, threads);
                CHECK(gate.status == FM_BAD_VALUE && gate.bad == 611);
            }
        Stored logits = good;
        for (int64_t e = 0; e < E; ++e) logits.set(2 * E + e, -INFINITY);
        CHECK(Gate(run, logits, T, E, K, {1, 1}, 2).bad == 2);
        const auto refused = [&](int64_t K, const Options& o, int64_t bad) {
            Gate gate(run, good, T, E, K, o, 1);
            return gate.status == FM_BAD_VALUE && gate.bad == bad;
        };
        CHECK(refused(E + 1, plain, -1) && refused(0, plain, -1));
        CHECK(refused(1, {0, 1, 4}, -1) && refused(1, {0, 1, 0}, -1));
        CHECK(refused(1, {0, 1, 3, 0}, -1) && refused(1, {0, 1, 3, 4}, -1));
        CHECK(refused(13, {0, 1, 3, 2}, -1) && !refused(12, {0, 1, 3, 2}, -1));
        CHECK(refused(1, {0, 1, 18, 1, 1}, -1) && !refused(1, {0, 1, 18, 1, 0}, -1));
        for (float value : {NAN, INFINITY, -INFINITY}) {
            Options biased = plain;
            biased.bias.assign(size_t(E), 0);
            biased.bias[17] = value;
            CHECK(refused(K, biased, -2));
        }
        good.dtype = fm_dtype(3);
        CHECK(Gate(run, good, T, E, K, plain, 1).status == FM_BAD_DTYPE);
        good.dtype = FM_F32;
    }
    Gate gate(fm_topk_gate_cpu, good, T, E, K, plain, 1);
    gate.ids[5 * K + 1] = E;
    for (auto run : VARIANTS(fm_topk_gate_backward_cpu)) {
        const Gradient gradient(run, gate, dweights, dprobs, plain, 2);
        CHECK(gradient.status == FM_BAD_VALUE && gradient.bad == 5);
    }
}

}  // namespace

int main() {
    const int64_t shapes[][3] = {{0, 4, 2},   {1, 1, 1},    {3, 5, 5},   {37, 8, 2},    {130, 64, 8},
                                 {41, 67, 9}, {60, 256, 8}, {5, 33, 33}, {40, 300, 50}, {3, 700, 200}};
    for (const auto& shape : shapes) check_shape(shape[0], shape[1], shape[2]);
    check_groups(60, 256, 8, 8, 4);
    check_groups(60, 160, 6, 8, 3);
    check_groups(9, 10, 3, 5, 2);
    check_groups(3, 600, 30, 150, 140);
    check_bad();
}
