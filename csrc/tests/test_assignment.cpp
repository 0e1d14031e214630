#include "fastmoe/assignment.h"

#include <algorithm>

#include "check.h"

DECLARE_VARIANTS(fm_balanced_assignment_cpu)
DECLARE_VARIANTS(fm_swipe_cpu)

namespace {

using Ids = std::vector<int64_t>;

double total(const std::vector<float>& scores, const Ids& ids, int64_t E) {
    double sum = 0;
    for (size_t t = 0; t < ids.size(); ++t) sum += scores[t * size_t(E) + size_t(ids[t])];
    return sum;
}

Ids assign(fm_status (*run)(fm_balanced_assignment_cpu_args*), const std::vector<float>& scores, int64_t T, int64_t E,
           int threads, int64_t bad = -1) {
    Ids ids(size_t(T), -9);
    std::vector<char> workspace(size_t(fm_balanced_assignment_workspace(T, E)), char(0x7f));
    fm_balanced_assignment_cpu_args a{scores.data(), T, E, ids.data(), workspace.data(), threads, -1};
    CHECK(run(&a) == (bad < 0 ? FM_OK : FM_BAD_VALUE) && (bad < 0 || a.bad == bad));
    return ids;
}

void check_assignment(int64_t T, int64_t E, double low, double high, bool by_all) {
    Draw draw;
    std::vector<float> scores(size_t(T * E));
    for (float& score : scores) score = float(draw.real(low, high));
    double best = -HUGE_VAL;
    Ids ids;
    for (int64_t i = 0; i < T; ++i) ids.push_back(i / (T / E));
    if (by_all) do
            best = std::max(best, total(scores, ids, E));
        while (std::next_permutation(ids.begin(), ids.end()));
    const Ids first = assign(fm_balanced_assignment_cpu, scores, T, E, 1);
    for (auto run : VARIANTS(fm_balanced_assignment_cpu))
        for (int threads : {1, 2, 3}) CHECK(assign(run, scores, T, E, threads) == first);
    for (int64_t e = 0; e < E; ++e) CHECK(std::count(first.begin(), first.end(), e) == T / E);
    if (by_all) CHECK_NEAR(total(scores, first, E), best, 2e-5 * double(T) * (high - low));
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        if (T == 0) break;
        scores[size_t(T * E - 1)] = bad;
        for (auto run : VARIANTS(fm_balanced_assignment_cpu)) assign(run, scores, T, E, 2, T - 1);
    }
}

// Slot by slot: workers grant ranks 0, 1, ... while there is room, then ranks 0, 1, ... fill workers 0, 1, ...
std::vector<Ids> plain_swipe(const std::vector<Ids>& ids, int64_t K, int64_t each) {
    const size_t W = ids.size();
    std::vector<Ids> chosen = ids;
    std::vector<int64_t> room;
    for (const Ids& own : ids) room.push_back(std::count_if(own.begin(), own.end(), [](int64_t e) { return e >= 0; }));
    for (int64_t j = 0; j < K; ++j) {
        std::vector<std::vector<char>> moved;
        for (const Ids& own : ids) moved.emplace_back(own.size());
        for (size_t w = 0; w < W; ++w)
            for (size_t s = 0; s < W; ++s)
                for (size_t i = size_t(j); i < ids[s].size(); i += size_t(K)) {
                    if (ids[s][i] < 0 || ids[s][i] / each != int64_t(w)) continue;
                    if (room[w])
                        --room[w];
                    else
                        moved[s][i] = 1;
                }
        for (size_t s = 0, w = 0; s < W; ++s)
            for (size_t i = 0; i < ids[s].size(); ++i) {
                if (!moved[s][i]) continue;
                while (room[w] == 0) ++w;
                --room[w];
                chosen[s][i] = int64_t(w) * each + j % each;
            }
    }
    return chosen;
}

template <class Id>
void check_swipe(const std::vector<int64_t>& tokens, int64_t K, int64_t each) {
    Draw draw;
    const int64_t W = int64_t(tokens.size());
    std::vector<Ids> ids;
    std::vector<int64_t> counts(size_t(W * W * K));
    for (int64_t s = 0; s < W; ++s) {
        ids.emplace_back(size_t(tokens[size_t(s)] * K));
        for (size_t i = 0; i < ids.back().size(); ++i) {
            const int64_t e = draw.integer(W * each + 1) - 1, low = draw.integer(e + 2) - 1;  // low ones more often
            ids.back()[i] = low;
            if (low >= 0) ++counts[size_t((s * W + low / each) * K + int64_t(i) % K)];
        }
    }
    const std::vector<Ids> want = plain_swipe(ids, K, each);
    for (auto run : VARIANTS(fm_swipe_cpu))
        for (int64_t s = 0; s < W; ++s) {
            std::vector<Id> own(ids[size_t(s)].begin(), ids[size_t(s)].end());
            Ids got(own.size(), -9);
            std::vector<int64_t> workspace(size_t(fm_swipe_workspace(W, K, each)), -9);
            fm_swipe_cpu_args a{own.data(),
                                sizeof(Id) == 8,
                                counts.data(),
                                tokens[size_t(s)],
                                K,
                                W,
                                s,
                                each,
                                got.data(),
                                workspace.data(),
                                0};
            CHECK(run(&a) == FM_OK);
            CHECK(got == want[size_t(s)]);
            if (own.empty()) continue;
            for (int64_t wrong : {int64_t(-2), W * each}) {
                std::vector<Id> bad = own;
                bad.back() = Id(wrong);
                a.topk_ids_TK = bad.data();
                CHECK(run(&a) == FM_BAD_VALUE && a.bad == wrong);
            }
            a.topk_ids_TK = own.data();
            for (int64_t by : {-1, 1, -1000}) {
                std::vector<int64_t> wrong = counts;
                wrong[size_t(s * W * K)] += by;
                a.counts_WWK = wrong.data();
                CHECK(run(&a) == FM_BAD_VALUE && a.bad == -1);
            }
        }
}

}  // namespace

int main() {
    check_assignment(0, 3, -1, 1, false);
    check_assignment(7, 1, -1, 1, false);
    check_assignment(6, 3, -1e4, 1e4, true);
    check_assignment(8, 2, 1e-6, 2e-6, true);
    check_assignment(6, 6, -1, 1, true);
    check_assignment(51, 17, -1, 1, false);
    check_assignment(640, 40, -1, 1, false);
    check_assignment(2048, 16, -1, 1, false);
    const std::vector<int64_t> ranks[] = {{0}, {7}, {5, 0, 9}, {40, 40, 3, 17}};
    for (const auto& tokens : ranks)
        for (int64_t K : {1, 2, 3}) {
            check_swipe<int32_t>(tokens, K, 1);
            check_swipe<int64_t>(tokens, K, 3);
        }
}
