#include "fastmoe/attention.h"

#include "args.h"

namespace {
// (B, N, M, Sq, Sk, H), low, high, scale, dtype, threads, (q_first, q_entries, q_order, k_first, k_entries, k_turn)
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using Layout = std::tuple<address, address, address, address, address, address>;
using LayerOf = std::tuple<Sizes, int64_t, int64_t, float, int, int, Layout>;
using Heads = std::tuple<address, int64_t, int64_t, int64_t>;  // address, strides of B, N and S

fm_attention layer_of(const LayerOf& l) {
    const auto& [sizes, low, high, scale, dtype, threads, layout] = l;
    const auto& [B, N, M, Sq, Sk, H] = sizes;
    const auto& [q_first, q_entries, q_order, k_first, k_entries, k_turn] = layout;
    return {B,
            N,
            M,
            Sq,
            Sk,
            H,
            low,
            high,
            scale,
            fm_dtype(dtype),
            threads,
            at<int32_t>(q_first),
            at<int32_t>(q_entries),
            at<int32_t>(q_order),
            at<int32_t>(k_first),
            at<int32_t>(k_entries),
            at<int32_t>(k_turn)};
}
fm_heads heads_of(const Heads& heads) {
    const auto& [p, B, N, S] = heads;
    return {at<void>(p), B, N, S};
}
}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention_workspace", [](const LayerOf& l) {
        const fm_attention layer = layer_of(l);
        return fm_attention_workspace(&layer);
    });
    m.def("attention_backward_workspace", [](const LayerOf& l) {
        const fm_attention layer = layer_of(l);
        return fm_attention_backward_workspace(&layer);
    });
    m.def("attention", [](const LayerOf& l, const Heads& q, const Heads& k, const Heads& v, address out, address lse,
                          address workspace) {
        fm_attention_cpu_args a{layer_of(l),   heads_of(q),    heads_of(k),        heads_of(v),
                                at<void>(out), at<float>(lse), at<void>(workspace)};
        run(fm_attention_cpu, a, "attention");
    });
    m.def("attention_backward",
          [](const LayerOf& l, const Heads& dout, address dlse, const Heads& q, const Heads& k, const Heads& v,
             address out, address lse, address dq, address dk, address dv, address workspace) {
              fm_attention_backward_cpu_args a{layer_of(l),  heads_of(dout), at<float>(dlse), heads_of(q),
                                               heads_of(k),  heads_of(v),    at<void>(out),   at<float>(lse),
                                               at<void>(dq), at<void>(dk),   at<void>(dv),    at<void>(workspace)};
              run(fm_attention_backward_cpu, a, "attention_backward");
          });
    m.def("rope", [](int64_t B, int64_t S, int64_t N, int64_t M, int64_t H, int dtype, int threads, address qkv,
                     address table, address q, address k, address v) {
        fm_rope_cpu_args a{
            B,           S,           N,          M, H, fm_dtype(dtype), threads, at<void>(qkv), at<float>(table),
            at<void>(q), at<void>(k), at<void>(v)};
        run(fm_rope_cpu, a, "rope");
    });
    m.def("rope_backward", [](int64_t B, int64_t S, int64_t N, int64_t M, int64_t H, int dtype, int threads,
                              const Heads& dq, const Heads& dk, const Heads& dv, address table, address dqkv) {
        fm_rope_backward_cpu_args a{B,
                                    S,
                                    N,
                                    M,
                                    H,
                                    fm_dtype(dtype),
                                    threads,
                                    heads_of(dq),
                                    heads_of(dk),
                                    heads_of(dv),
                                    at<float>(table),
                                    at<void>(dqkv)};
        run(fm_rope_backward_cpu, a, "rope_backward");
    });
}
