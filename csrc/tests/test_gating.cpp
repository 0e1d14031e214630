#include "fastmoe/gating.h"

#include <algorithm>

#include "check.h"

DECLARE_VARIANTS(fm_topk_gate_cpu)
DECLARE_VARIANTS(fm_topk_gate_backward_cpu)

namespace {

struct Gate {
    int64_t T, E, K;
    Stored weights, probs;
    std::vector<int64_t> ids;
    int64_t bad = 0;
    fm_status status;

    Gate(fm_status (*run)(fm_topk_gate_cpu_args*), Stored& logits, int64_t T, int64_t E, int64_t K, int sigmoid,
         int renormalize, int threads)
        : T(T), E(E), K(K), weights(FM_F32, T * K), probs(FM_F32, T * E), ids(size_t(T * K), -7) {
        std::vector<float> workspace(size_t(fm_topk_gate_workspace(E, threads)), NAN);
        fm_topk_gate_cpu_args a{logits.data(),
                                T,
                                E,
                                K,
                                logits.dtype,
                                sigmoid,
                                renormalize,
                                weights.floats(),
                                ids.data(),
                                probs.floats(),
                                workspace.data(),
                                threads,
                                0};
        status = run(&a);
        bad = a.bad;
    }
    bool operator==(const Gate& o) const { return weights == o.weights && probs == o.probs && ids == o.ids; }
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

void check_forward(const Gate& gate, const Stored& logits, int sigmoid, int renormalize) {
    const int64_t E = gate.E, K = gate.K;
    CHECK(gate.status == FM_OK);
    for (int64_t t = 0; t < gate.T; ++t) {
        std::vector<int64_t> order(static_cast<size_t>(E));
        for (int64_t e = 0; e < E; ++e) order[size_t(e)] = e;
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t a, int64_t b) { return logits[t * E + a] > logits[t * E + b]; });
        const std::vector<double> p = scores(logits, t, E, sigmoid);
        double total = 0;
        for (int64_t k = 0; k < K; ++k) total += p[size_t(order[size_t(k)])];
        for (int64_t e = 0; e < E; ++e) CHECK_NEAR(gate.probs[t * E + e], p[size_t(e)], 5e-7);
        for (int64_t k = 0; k < K; ++k) {
            CHECK(gate.ids[size_t(t * K + k)] == order[size_t(k)]);
            CHECK_NEAR(gate.weights[t * K + k], p[size_t(order[size_t(k)])] / (renormalize ? total : 1), 5e-7);
        }
    }
}

struct Gradient {
    Stored dlogits;
    fm_status status;
    int64_t bad;

    Gradient(fm_status (*run)(fm_topk_gate_backward_cpu_args*), Gate& gate, Stored& dweights, Stored& dprobs,
             int sigmoid, int renormalize, int threads)
        : dlogits(FM_F32, gate.T * gate.E) {
        fm_topk_gate_backward_cpu_args a{dweights.floats(),
                                         dprobs.floats(),
                                         gate.ids.data(),
                                         gate.probs.floats(),
                                         gate.T,
                                         gate.E,
                                         gate.K,
                                         sigmoid,
                                         renormalize,
                                         dlogits.floats(),
                                         threads,
                                         0};
        status = run(&a);
        bad = a.bad;
    }
};

void check_backward(const Gradient& got, const Gate& gate, const Stored& logits, const Stored& dweights,
                    const Stored& dprobs, int sigmoid, int renormalize) {
    const int64_t E = gate.E, K = gate.K;
    CHECK(got.status == FM_OK);
    for (int64_t t = 0; t < gate.T; ++t) {
        const std::vector<double> p = scores(logits, t, E, sigmoid);
        std::vector<double> g(static_cast<size_t>(E));
        double total = 0, dot = 0, mean = 0;
        for (int64_t e = 0; e < E; ++e) g[size_t(e)] = dprobs[t * E + e];
        for (int64_t k = 0; k < K; ++k) {
            total += p[size_t(gate.ids[size_t(t * K + k)])];
            dot += p[size_t(gate.ids[size_t(t * K + k)])] * dweights[t * K + k];
        }
        for (int64_t k = 0; k < K; ++k)
            g[size_t(gate.ids[size_t(t * K + k)])] +=
                renormalize ? (dweights[t * K + k] - dot / total) / total : dweights[t * K + k];
        for (int64_t e = 0; e < E; ++e) mean += g[size_t(e)] * p[size_t(e)];
        for (int64_t e = 0; e < E; ++e) {
            const double slope = sigmoid ? p[size_t(e)] * (1 - p[size_t(e)]) : p[size_t(e)];
            CHECK_NEAR(got.dlogits[t * E + e], slope * (g[size_t(e)] - (sigmoid ? 0 : mean)), 3e-6);
        }
    }
}

void check_shape(int64_t T, int64_t E, int64_t K) {
    Draw draw;
    for (fm_dtype dtype : kDtypes)
        for (int sigmoid : {0, 1})
            for (int renormalize : {0, 1}) {
                Stored logits(dtype, T * E, draw, -8, 8), dweights(FM_F32, T * K, draw), dprobs(FM_F32, T * E, draw);
                for (int64_t i = 0; i < T * E; ++i)
                    if (draw.integer(5) == 0) logits.set(i, draw.integer(2) ? 1.5 : i % E == 0 ? 0 : -INFINITY);
                for (int64_t t = 0; t < T; ++t) logits.set(t * E + draw.integer(E), 1.5);
                for (auto run : VARIANTS(fm_topk_gate_cpu)) {
                    Gate gate(run, logits, T, E, K, sigmoid, renormalize, 1);
                    check_forward(gate, logits, sigmoid, renormalize);
                    for (int threads : {2, 3}) CHECK(gate == Gate(run, logits, T, E, K, sigmoid, renormalize, threads));
                }
                Gate gate(fm_topk_gate_cpu, logits, T, E, K, sigmoid, renormalize, 1);
                for (auto run : VARIANTS(fm_topk_gate_backward_cpu)) {
                    Gradient gradient(run, gate, dweights, dprobs, sigmoid, renormalize, 1);
                    check_backward(gradient, gate, logits, dweights, dprobs, sigmoid, renormalize);
                    for (int threads : {2, 3})
                        CHECK(gradient.dlogits ==
                              Gradient(run, gate, dweights, dprobs, sigmoid, renormalize, threads).dlogits);
                }
            }
}

void check_bad() {
    Draw draw;
    const int64_t T = 700, E = 19, K = 3;
    Stored dweights(FM_F32, T * K, draw), dprobs(FM_F32, T * E, draw), good(FM_F32, T * E, draw);
    for (auto run : VARIANTS(fm_topk_gate_cpu)) {
        for (double value : {double(NAN), double(INFINITY)})
            for (int threads : {1, 3}) {
                Stored logits = good;
                logits.set(611 * E + 18, value);
                logits.set(690 * E, value);
                Gate gate(run, logits, T, E, K, 0, 1, threads);
                CHECK(gate.status == FM_BAD_VALUE && gate.bad == 611);
            }
        Stored logits = good;
        for (int64_t e = 0; e < E; ++e) logits.set(2 * E + e, -INFINITY);
        CHECK(Gate(run, logits, T, E, K, 1, 1, 2).bad == 2);
        CHECK(Gate(run, good, T, E, E + 1, 0, 1, 1).status == FM_BAD_VALUE);
        CHECK(Gate(run, good, T, E, 0, 0, 1, 1).status == FM_BAD_VALUE);
        good.dtype = fm_dtype(3);
        CHECK(Gate(run, good, T, E, K, 0, 1, 1).status == FM_BAD_DTYPE);
        good.dtype = FM_F32;
    }
    Gate gate(fm_topk_gate_cpu, good, T, E, K, 0, 1, 1);
    gate.ids[5 * K + 1] = E;
    for (auto run : VARIANTS(fm_topk_gate_backward_cpu)) {
        const Gradient gradient(run, gate, dweights, dprobs, 0, 1, 2);
        CHECK(gradient.status == FM_BAD_VALUE && gradient.bad == 5);
    }
}

}  // namespace

int main() {
    const int64_t shapes[][3] = {{0, 4, 2},    {1, 1, 1},   {3, 5, 5},    {37, 8, 2},
                                 {130, 64, 8}, {41, 67, 9}, {60, 256, 8}, {5, 33, 33}};
    for (const auto& shape : shapes) check_shape(shape[0], shape[1], shape[2]);
    check_bad();
}
