/* Cutting a workspace into pieces; shared by the kernels and by the functions that size their workspaces. */
#pragma once
#include "fastmoe/attention.h"
#include "fastmoe/experts.h"

namespace {
namespace fm_workspace {

/* gemm.h's block: rows of A, columns of B, lanes of k. The packed A, the packed B and C share an L2. */
constexpr int64_t kRowsOfBlock = 384, kColumnsOfBlock = 128, kLanesOfBlock = 192;
constexpr int64_t kThreadFloats = kRowsOfBlock * kLanesOfBlock + kLanesOfBlock * kColumnsOfBlock +
                                  kRowsOfBlock * kColumnsOfBlock + 64; /* what gemm.h needs of a thread */

inline int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

/* Takes pieces of a buffer in order; with a null buffer it only counts. */
struct Cutter {
    float* memory;
    int64_t used = 0;
    template <class T = float>
    T* take(int64_t elements) {
        float* piece = memory ? memory + used : nullptr;
        used += aligned((elements * int64_t(sizeof(T)) + 3) / 4);
        return reinterpret_cast<T*>(piece);
    }
};

/* The expert layer. Between: the type of rows between two products; Stored: the layer's dtype. Rows of tokens are read
 * where they are or, where they are of another size than Between, copied to it. */
inline bool gated(const fm_moe_layer& layer) { return layer.activation <= FM_CLAMPED_SWIGLU; }
inline int64_t width_of_z(const fm_moe_layer& layer) { return gated(layer) ? 2 * layer.F : layer.F; }
/* Columns of F in one block of the products with z, and how many such blocks. */
inline int64_t f_columns(const fm_moe_layer& layer) { return gated(layer) ? kColumnsOfBlock / 2 : kColumnsOfBlock; }
inline int64_t f_blocks(const fm_moe_layer& layer) { return (layer.F + f_columns(layer) - 1) / f_columns(layer); }

template <class Between, class Stored>
int64_t copied(const fm_moe_layer& l) {
    return sizeof(Between) == sizeof(Stored) ? 0 : l.T * l.D;
}

template <class Between, class Stored>
struct Forward {
    int32_t *token, *first_block;
    Between *x, *act, *y;
    float* threads;
    int64_t floats;
    Forward(void* memory, const fm_moe_layer& l) {
        Cutter cut{static_cast<float*>(memory)};
        token = cut.take<int32_t>(l.R), first_block = cut.take<int32_t>(l.E + 1);
        x = cut.take<Between>(copied<Between, Stored>(l));
        act = cut.take<Between>(l.R * l.F), y = cut.take<Between>(l.R * l.D);
        threads = cut.take(l.num_threads * aligned(kThreadFloats));
        floats = cut.used;
    }
};

template <class Between, class Stored>
struct Backward {
    int32_t *token, *first_block, *touched;
    float *weight, *dot, *threads;
    Between *x, *dy, *dz, *act, *dx;
    Stored* z; /* computed again with FM_SAVE_X */
    int64_t floats;
    Backward(void* memory, const fm_moe_layer& l) {
        Cutter cut{static_cast<float*>(memory)};
        const int64_t Z = width_of_z(l);
        token = cut.take<int32_t>(l.R), first_block = cut.take<int32_t>(l.E + 1), touched = cut.take<int32_t>(l.E);
        weight = cut.take(l.R), dot = cut.take(l.R * f_blocks(l));
        x = cut.take<Between>(copied<Between, Stored>(l)), dy = cut.take<Between>(copied<Between, Stored>(l));
        dz = cut.take<Between>(l.R * Z), act = cut.take<Between>(l.R * l.F), dx = cut.take<Between>(l.R * l.D);
        z = cut.take<Stored>(l.save == FM_SAVE_X ? l.R * Z : 0);
        threads = cut.take(l.num_threads * aligned(kThreadFloats));
        floats = cut.used;
    }
};

/* A thread of the gate: a row's logits, scores + bias, those of its best groups; what best() works on; counts. */
struct Gate {
    float *z, *biased, *shortlist, *group, *values;
    int32_t *numbers, *order, *first; /* first: the first expert of each group that is kept */
    int64_t *count, floats;
    Gate(float* memory, int64_t E) {
        Cutter cut{memory};
        z = cut.take(E), biased = cut.take(E), shortlist = cut.take(E), group = cut.take(E);
        values = cut.take(E + 16), numbers = cut.take<int32_t>(E + 16); /* written in whole vectors */
        order = cut.take<int32_t>(E), first = cut.take<int32_t>(E), count = cut.take<int64_t>(E);
        floats = cut.used;
    }
};

/* The loss. Tokens go in chunks whose logits fit 64 MiB, a chunk in blocks of kRows, whatever the thread count. */
constexpr int64_t kRows = 96;

struct Loss {
    float *dlogits, *loss_T, *threads;
    int64_t chunk, floats;
    Loss(void* memory, int64_t T, int64_t V, int num_threads) {
        chunk = (int64_t(16) << 20) / V / kRows * kRows;
        if (chunk < kRows) chunk = kRows;
        if (chunk > T) chunk = T;
        Cutter cut{static_cast<float*>(memory)};
        dlogits = cut.take(chunk * V), loss_T = cut.take(T), threads = cut.take(num_threads * aligned(kThreadFloats));
        floats = cut.used;
    }
};

/* Attention. K: numbers in a packed lane, 2 where pairs of bfloat16 are multiplied. Heads are padded to kPanel, the
 * widest panel of columns; keys and queries to whole blocks. */
constexpr int64_t kHead = 256, kPanel = 32, kBlock = FM_ATTENTION_BLOCK;
constexpr int64_t kTile = 2 * kBlock; /* keys that the forward takes at once */
inline int64_t blocks_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }
inline int64_t padded(int64_t H) { return (H + kPanel - 1) / kPanel * kPanel; }
/* Floats from one row to the next where panels are read out of rows: not a multiple of what conflicts in a cache. */
inline int64_t row_of(int64_t H) { return padded(H) + (padded(H) % 128 ? 0 : 16); }

struct AttentionForward {
    float *k, *v, *threads; /* k: panels of keys; v: panels of the head, keys run along them */
    int64_t thread, floats;
    AttentionForward(void* memory, const fm_attention& l, int K) {
        Cutter cut{static_cast<float*>(memory)};
        const int64_t keys = l.B * l.M * blocks_of(l.Sk) * kBlock;
        k = cut.take(keys * ((l.H + K - 1) / K)), v = cut.take(keys / K * padded(l.H));
        thread = aligned(kBlock * (row_of(l.H) + padded(l.H) + kTile + 16 + 3));
        threads = cut.take(l.num_threads * thread);
        floats = cut.used;
    }
};

struct AttentionBackward {
    float *q, *dy;               /* rows as the left side of a product */
    float *q_panels, *dy_panels; /* K = 2: the same as the right side */
    float *dq, *delta, *lse;     /* dq: the sums so far; lse: inf where -inf came */
    int32_t *turn, *next;        /* turn: key blocks that a query block has got; next: the next work item */
    float* threads;
    int64_t thread, floats;
    AttentionBackward(void* memory, const fm_attention& l, int K) {
        Cutter cut{static_cast<float*>(memory)};
        const int64_t blocks = l.B * l.N * blocks_of(l.Sq), rows = blocks * kBlock, across = K == 1 ? 0 : rows / 2;
        q = cut.take(rows / K * row_of(l.H)), dy = cut.take(rows / K * row_of(l.H));
        q_panels = cut.take(across * padded(l.H)), dy_panels = cut.take(across * padded(l.H));
        dq = cut.take(rows * padded(l.H)), delta = cut.take(rows), lse = cut.take(rows);
        turn = cut.take<int32_t>(blocks), next = cut.take<int32_t>(16);
        thread = aligned(kBlock * (5 * padded(l.H) + 4 * kBlock));
        threads = cut.take(l.num_threads * thread);
        floats = cut.used;
    }
};

/* A tensor [matrices, n, m] of adafactor_step; matrices < 0: a vector [n, 1]. */
inline int64_t matrices(const int64_t* shape) { return shape[0] < 0 ? 1 : shape[0]; }
/* Matrices that stay in a core's cache between the passes are left to one thread each. */
inline bool alone(const int64_t* shape) { return shape[1] * shape[2] <= int64_t(1) << 18; }

/* One of its matrices, or the vector: rows go in at most kTiles tiles, whatever the thread count. */
constexpr int64_t kTiles = 64, kTileElements = 16384, kColumns = 1024;

struct Adafactor {
    int64_t rows, tiles, floats;       /* rows of a tile */
    double *means, *weights, *updates; /* a tile's sums of R, squared weights, squared updates */
    float *columns, *unit;             /* sums over a tile's rows [tiles, m]; 1 / sqrt(C) [m] */
    Adafactor(float* memory, int64_t n, int64_t m) : rows(m ? kTileElements / m : 1) {
        if (rows < (n + kTiles - 1) / kTiles) rows = (n + kTiles - 1) / kTiles;
        if (rows < 1) rows = 1;
        tiles = m ? (n + rows - 1) / rows : 0;
        Cutter cut{memory};
        means = cut.take<double>(tiles), weights = cut.take<double>(tiles), updates = cut.take<double>(tiles);
        columns = cut.take(tiles * m), unit = cut.take(m);
        floats = cut.used;
    }
};

/* memory: of_thread floats for each thread, or all of it for one matrix that the team shares. */
struct AdafactorList {
    int64_t* first_unit; /* [count+1] */
    float* memory;
    int64_t of_thread = 0, floats;
    AdafactorList(void* workspace, int64_t count, const int64_t* shapes, int num_threads) {
        int64_t shared = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t* shape = shapes + 3 * i;
            const int64_t needed = matrices(shape) ? Adafactor(nullptr, shape[1], shape[2]).floats : 0;
            int64_t& most = alone(shape) ? of_thread : shared;
            if (most < needed) most = needed;
        }
        Cutter cut{static_cast<float*>(workspace)};
        first_unit = cut.take<int64_t>(count + 1);
        memory = cut.take(of_thread * num_threads > shared ? of_thread * num_threads : shared);
        floats = cut.used;
    }
};

/* The auction of balanced_assignment. Rows of level_TE are padded to whole vectors. */
struct Auction {
    int64_t stride, floats;
    int32_t *level_TE, *price_E, *held_E, *waiting_T, *expert_T;
    int64_t *offer_T, *heap_T;
    Auction(void* memory, int64_t T, int64_t E) : stride(aligned(E)) {
        Cutter cut{static_cast<float*>(memory)};
        level_TE = cut.take<int32_t>(T * stride), price_E = cut.take<int32_t>(stride), held_E = cut.take<int32_t>(E);
        waiting_T = cut.take<int32_t>(T), expert_T = cut.take<int32_t>(T);
        offer_T = cut.take<int64_t>(T), heap_T = cut.take<int64_t>(T);
        floats = cut.used;
    }
};

}  // namespace fm_workspace
}  // namespace
