#include "fastmoe/adafactor.h"

#include <omp.h>

#include "weights.h"
#include "workspace.h"

namespace {

using namespace fm_workspace;
using Args = fm_adafactor_step_cpu_args;

/* One matrix of a stack, or one vector: [n, m], [n, 1]. Tiles of rows are worked on by any thread, sums over tiles run
 * in their order. */
template <class S, class Weights>
struct Unit {
    const Args* a;
    int64_t tensor, index, n, m;
    const S* grad;
    Weights weights;
    Adafactor ws;
    float beta, rest, eps, scale;

    Unit(const Args* a, int64_t tensor, int64_t index, Weights weights, float* memory)
        : a(a),
          tensor(tensor),
          index(index),
          n(a->shapes[3 * tensor + 1]),
          m(a->shapes[3 * tensor + 2]),
          grad(static_cast<const S*>(a->grads[tensor]) + index * n * m),
          weights(weights),
          ws(memory, n, m),
          beta(float(a->betas[tensor])),
          rest(float(1 - a->betas[tensor])),
          eps(float(a->eps_square)),
          scale(float(a->grad_scale)) {}

    int64_t end(int64_t tile) const { return (tile + 1) * ws.rows < n ? (tile + 1) * ws.rows : n; }
    template <class N>
    vf gradient(int64_t i, N k) const {
        return load(grad + i, k) * scale;
    }
    float weight_squares(int64_t begin, int64_t count) const {
        const int64_t first = index * n * m + begin;
        return sum_vectors(count, [&](int64_t i, auto k) {
            const vf x = weights.load_at(first + i, k);
            return x * x;
        });
    }
    double total(const double* sums) const {
        double sum = 0;
        for (int64_t tile = 0; tile < ws.tiles; ++tile) sum += sums[tile];
        return sum;
    }
    double step() const {
        if (!a->scaled) return a->rates[tensor];
        const double rms = __builtin_sqrt(total(ws.weights) / double(n * m));
        return a->rates[tensor] * (rms > a->eps_weight ? rms : a->eps_weight);
    }
    /* The step over what the update is divided by. */
    double clipped(double step) const {
        const double excess = __builtin_sqrt(total(ws.updates) / double(n * m)) / a->clip_threshold;
        return excess > 1 ? step / excess : step;
    }
    template <class N>
    void write(int64_t i, vf update, row_words row, int64_t column, float decay, N k) const {
        const int64_t at = index * n * m + i;
        const vu draws = Weights::random ? random_bits(column_words(column), row) << 16 : vu{};
        weights.store_at(at, weights.load_at(at, k) * decay - update, draws, k);
    }
};

template <class S, class Weights>
struct Matrix : Unit<S, Weights> {
    using Base = Unit<S, Weights>;
    using Base::a, Base::tensor, Base::index, Base::n, Base::m, Base::ws, Base::beta, Base::rest, Base::eps;
    float *R, *C;

    Matrix(const Args* a, int64_t tensor, int64_t index, Weights weights, float* memory)
        : Base(a, tensor, index, weights, memory), R(a->rows[tensor] + index * n), C(a->columns[tensor] + index * m) {}

    template <int N>
    void add_rows(int64_t row, float* columns) const {
        vf sums[N] = {};
        each_vector(m, [&](int64_t j, auto k) {
            vf column = load(columns + j, k);
            for (int i = 0; i < N; ++i) {
                const vf g = this->gradient((row + i) * m + j, k);
                sums[i] += g * g;
                column += g * g;
            }
            store(columns + j, column, k);
        });
        for (int i = 0; i < N; ++i) R[row + i] = beta * R[row + i] + rest * (sum(sums[i]) / float(m) + eps);
    }
    /* R; the tile's part of C and of the sums over R and the squared weights. */
    void rows(int64_t tile) const {
        const int64_t begin = tile * ws.rows, end = this->end(tile);
        float* columns = ws.columns + tile * m;
        memset(columns, 0, size_t(m) * sizeof(float));
        int64_t row = begin;
        for (; row + 4 <= end; row += 4) add_rows<4>(row, columns);
        for (; row < end; ++row) add_rows<1>(row, columns);
        double sum = 0, squares = 0;
        for (row = begin; row < end; ++row) {
            sum += R[row];
            if (a->scaled) squares += this->weight_squares(row * m, m);
        }
        ws.means[tile] = sum, ws.weights[tile] = squares;
    }
    /* A block of C and of 1 / sqrt(C). */
    void columns(int64_t block) const {
        const int64_t begin = block * kColumns;
        each_vector(m - begin < kColumns ? m - begin : kColumns, [&](int64_t i, auto k) {
            const int64_t j = begin + i;
            vf sum = splat(0);
            for (int64_t tile = 0; tile < ws.tiles; ++tile) sum += load(ws.columns + tile * m + j, k);
            const vf c = beta * load(C + j, k) + rest * (sum / float(n) + eps);
            store(C + j, c, k);
            store(ws.unit + j, 1 / sqrt(c), k);
        });
    }
    double mean_R() const { return this->total(ws.means) / double(n); }
    void update_squares(int64_t tile) const {
        const double mean = mean_R();
        double squares = 0;
        for (int64_t row = tile * ws.rows; row < this->end(tile); ++row)
            squares += mean / R[row] * sum_vectors(m, [&](int64_t j, auto k) {
                           const vf u = this->gradient(row * m + j, k) * load(ws.unit + j, k);
                           return u * u;
                       });
        ws.updates[tile] = squares;
    }
    void update(int64_t tile) const {
        const double mean = mean_R(), step = this->step(), clipped = this->clipped(step);
        const float decay = float(1 - step * a->weight_decay);
        for (int64_t row = tile * ws.rows; row < this->end(tile); ++row) {
            const float factor = float(clipped * __builtin_sqrt(mean / R[row]));
            const row_words words(uint64_t(a->keys[tensor]), uint64_t(a->first_rows[tensor] + index * n + row));
            each_vector(m, [&](int64_t j, auto k) {
                const vf update = this->gradient(row * m + j, k) * load(ws.unit + j, k) * factor;
                this->write(row * m + j, update, words, j, decay, k);
            });
        }
    }
};

template <class S, class Weights>
struct Vector : Unit<S, Weights> {
    using Base = Unit<S, Weights>;
    using Base::a, Base::tensor, Base::n, Base::ws, Base::beta, Base::rest, Base::eps;
    float* V;

    Vector(const Args* a, int64_t tensor, Weights weights, float* memory)
        : Base(a, tensor, 0, weights, memory), V(a->squares[tensor]) {}

    void squares(int64_t tile) const {
        const int64_t begin = tile * ws.rows, count = this->end(tile) - begin;
        ws.updates[tile] = sum_vectors(count, [&](int64_t i, auto k) {
            const vf g = this->gradient(begin + i, k), square = g * g;
            const vf v = beta * load(V + begin + i, k) + rest * (square + eps);
            store(V + begin + i, v, k);
            return square / v;
        });
        if (a->scaled) ws.weights[tile] = this->weight_squares(begin, count);
    }
    void update(int64_t tile) const {
        const double step = this->step();
        const float factor = float(this->clipped(step)), decay = float(1 - step * a->weight_decay);
        const row_words words(uint64_t(a->keys[tensor]), uint64_t(a->first_rows[tensor]));
        const int64_t begin = tile * ws.rows;
        each_vector(this->end(tile) - begin, [&](int64_t j, auto k) {
            const int64_t i = begin + j;
            this->write(i, this->gradient(i, k) / sqrt(load(V + i, k)) * factor, words, i, decay, k);
        });
    }
};

/* f(0) .. f(count - 1), shared out to the team where all of it has come here. */
template <class F>
void each(bool whole_team, int64_t count, F f) {
    if (whole_team) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) f(i);
    } else {
        for (int64_t i = 0; i < count; ++i) f(i);
    }
}

template <class S, class Weights>
void run(const Args* a, int64_t tensor, int64_t index, Weights weights, float* memory, bool whole_team) {
    if (a->shapes[3 * tensor] < 0) {
        const Vector<S, Weights> v(a, tensor, weights, memory);
        each(whole_team, v.ws.tiles, [&](int64_t tile) { v.squares(tile); });
        each(whole_team, v.ws.tiles, [&](int64_t tile) { v.update(tile); });
        return;
    }
    const Matrix<S, Weights> x(a, tensor, index, weights, memory);
    if (!x.n) return;
    each(whole_team, x.ws.tiles, [&](int64_t tile) { x.rows(tile); });
    each(whole_team, (x.m + kColumns - 1) / kColumns, [&](int64_t block) { x.columns(block); });
    each(whole_team, x.ws.tiles, [&](int64_t tile) { x.update_squares(tile); });
    each(whole_team, x.ws.tiles, [&](int64_t tile) { x.update(tile); });
}

fm_status run(const Args* a, int64_t tensor, int64_t index, float* memory, bool whole_team) {
    void *param = a->params[tensor], *master = a->masters[tensor];
    if (a->kinds[tensor] == FM_MASTER_RESIDUAL) {
        const weights<bf16, code8> w{static_cast<bf16*>(param), static_cast<code8*>(master)};
        run<bf16>(a, tensor, index, w, memory, whole_team);
        return FM_OK;
    }
    FM_WITH_DTYPE(a->dtypes[tensor], S, {
        S* p = static_cast<S*>(param);
        if (a->kinds[tensor] == FM_MASTER_F32)
            run<S>(a, tensor, index, weights<S, float>{p, static_cast<float*>(master)}, memory, whole_team);
        else
            run<S>(a, tensor, index, weights<S, void>{p, nullptr}, memory, whole_team);
    })
    return FM_OK;
}

}  // namespace

FM_KERNEL(fm_adafactor_step_cpu) {
    const AdafactorList list(a->workspace, a->count, a->shapes, a->num_threads);
    int64_t units = 0, elements = 0; /* units: those one thread does alone */
    for (int64_t i = 0; i < a->count; ++i) {
        if (a->dtypes[i] < FM_F32 || a->dtypes[i] > FM_F16) return FM_BAD_DTYPE;
        if (a->kinds[i] == FM_MASTER_RESIDUAL && a->dtypes[i] != FM_BF16) return FM_BAD_DTYPE;
        const int64_t* shape = a->shapes + 3 * i;
        list.first_unit[i] = units;
        units += alone(shape) ? matrices(shape) : 0;
        elements += matrices(shape) * shape[1] * shape[2];
    }
    list.first_unit[a->count] = units;
#pragma omp parallel num_threads(team(elements, a->num_threads))
    {
        float* memory = list.memory + omp_get_thread_num() * list.of_thread;
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; ++unit) {
            int64_t tensor = 0, past = a->count; /* first_unit[tensor] <= unit < first_unit[past] */
            while (past - tensor > 1) {
                const int64_t middle = (tensor + past) / 2;
                (list.first_unit[middle] <= unit ? tensor : past) = middle;
            }
            run(a, tensor, unit - list.first_unit[tensor], memory, false);
        }
        for (int64_t i = 0; i < a->count; ++i)
            for (int64_t index = 0; !alone(a->shapes + 3 * i) && index < matrices(a->shapes + 3 * i); ++index)
                run(a, i, index, list.memory, true);
    }
    return FM_OK;
}
