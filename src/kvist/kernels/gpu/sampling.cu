// Chooses tokens: three kernels over the shifted logits of a batch; sampling.py launches them and explains their order,
// truncation.py explains bins and cuts.
//
// Sums over tokens are sums of integers, so no result depends on the order in which programs and threads run:
// tensor-parallel ranks choose the same tokens.
//
// sampling.py puts the constants, LOGIT (the type of a logit), COUNT (of an occurrence count) and to_float() before this
// text.

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr u32 ALL_LANES = 0xFFFFFFFF;
#define INFINITE __int_as_float(0x7F800000)
constexpr float FIXED_ONE = 1099511627776.0f;  // 2^40: weights as integers; 2^23 of them fit into 64 bits
constexpr int PER_LANE = GROUP / 32, PER_THREAD = MAX_LISTED / THREADS, WARPS = THREADS / 32;

struct Rows {
    const LOGIT* logits;
    long long row_stride;
    const float* maxima;  // num_maxima for each row: of each group of GROUP logits
    const float* temperatures;
    const u32* keys;  // 2 for each row
    const int* top_k;
    const float* top_p;
    const float* reach;
    const float* highest;  // NaN: the row has no valid token
    const float* bounds;  // no logit below it matters for the bins
    int* counts;  // BINS for each row
    u64* weights;  // BINS for each row
    const int* cut_bins;  // 4 for each row: first, last, kth, tokens before kth
    const double* cut_weights;  // 3 for each row: before first, before kth, of all tokens
    int* num_listed;
    int* listed_bits;  // MAX_LISTED for each row
    int* listed_tokens;
    float* best;  // num_maxima for each row: the best score of each group
    int* best_token;
    long long* chosen;
    const int* slots;  // null: no row has shaped logits
    const int* flags;
    COUNT* occurrences;
    int* recent;
    int vocab_size, num_maxima, num_chunks, word_tokens;
};

__device__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ int bin_of(float distance) { return min(max((__float_as_int(distance) >> SHIFT) - FIRST_BIN, 0), BINS - 1); }

__device__ int edge_bits(int bin) { return bin > 0 ? (bin + FIRST_BIN) << SHIFT : 0; }

__device__ int last_bits(int bin) { return bin == BINS - 1 ? __float_as_int(INFINITE) - 1 : edge_bits(bin + 1) - 1; }

// The weight of a token relative to that of the edge. `scale` turns distances into powers of two.
__device__ float weight(float edge, float distance, float scale) { return exp2f((edge - distance) * scale); }

__device__ float scale_of(float temperature) { return 1.44269504f / temperature; }

// ---------------------------------------------------------------- noise; kernels/sampling.py explains the hash

__device__ u32 hash(u32 low, u32 high, u32 token) {
    u32 hashed = (token * 0x9E3779B1u) ^ low;
    hashed = (hashed ^ (hashed >> 16)) * 0x85EBCA6Bu;
    hashed = ((hashed ^ (hashed >> 13)) + high) * 0xC2B2AE35u;
    hashed = (hashed ^ (hashed >> 16)) * 0x27D4EB2Fu;
    return (hashed ^ (hashed >> 15)) & 0x7FFFFFFFu;
}

__device__ float gumbel(u32 hashed) {
    const float value =
        fminf((static_cast<float>(static_cast<int>(hashed)) + 0.5f) * 4.656612873077393e-10f, 0.9999999403953552f);
    // -log1p(-value): where the noise is large, value is small, and the logarithm of 1 - value would be inexact.
    const float series = value * (1.0f + value * (0.5f + value * (0.333333333f + value * (0.25f + value * 0.2f))));
    return -__logf(value < 0.03125f ? series : -__logf(1.0f - value));
}

// An upper bound of the noise without a logarithm: the noise of `value` is at most -log(value), and the bits of a float
// are piecewise linear in it, below its logarithm.
__device__ float most_noise(u32 hashed) {
    return (((127 + 31) << 23) - __float_as_int(static_cast<float>(static_cast<int>(hashed)))) * 8.262958e-08f;  // ln 2 / 2^23
}

constexpr float ROUNDING = 1e-3f;  // of a bound; generous

__device__ bool is_better(float score, int token, float than, int than_token) {
    return score > than || (score == than && token < than_token);
}

__device__ void take_best_of_warp(float& score, int& token) {
#pragma unroll
    for (int step = 16; step; step /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, score, step);
        const int other_token = __shfl_xor_sync(ALL_LANES, token, step);
        if (is_better(other, other_token, score, token)) score = other, token = other_token;
    }
}

// ---------------------------------------------------------------- bins

// A program counts the bins of CHUNK logits of a row that truncates in shared memory, a warp at a group, and adds its
// sums to those of the row.
extern "C" __global__ void __launch_bounds__(THREADS) fill_bins(const Rows rows) {
    __shared__ u32 counts[BINS], weights[BINS];
    wait_for_inputs();
    const long long row = blockIdx.x / rows.num_chunks;
    const int chunk = blockIdx.x % rows.num_chunks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float temperature = rows.temperatures[row], highest = rows.highest[row], bound = rows.bounds[row];
    const bool uses_k = rows.top_k[row] > 0 && rows.top_k[row] < rows.vocab_size, uses_p = rows.top_p[row] < 1.0f;
    if (temperature == 0.0f || highest != highest || !(uses_k || uses_p)) return;

    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) counts[bin] = weights[bin] = 0;
    __syncthreads();
    const LOGIT* logits = rows.logits + row * rows.row_stride;
    const float scale = scale_of(temperature), one = 1 << WEIGHT_BITS;
    const int end = min((chunk + 1) * (CHUNK / GROUP), rows.num_maxima);
    bool is_used = false;
    for (int group = chunk * (CHUNK / GROUP) + warp; group < end; group += WARPS) {
        if (rows.maxima[row * rows.num_maxima + group] < bound) continue;
        is_used = true;
        float values[PER_LANE];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int token = group * GROUP + i * 32 + lane;
            values[i] = token < rows.vocab_size ? to_float(logits[token]) : -INFINITE;
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            if (values[i] == -INFINITE || values[i] < bound) continue;
            const float distance = highest - values[i];
            const int bin = bin_of(distance);
            if (uses_k) atomicAdd(counts + bin, 1u);
            if (uses_p) {
                const float fraction = weight(__int_as_float(edge_bits(bin)), distance, scale);
                atomicAdd(weights + bin, static_cast<u32>(fraction * one + 0.5f));
            }
        }
    }
    if (!__syncthreads_or(is_used)) return;
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
        if (counts[bin]) atomicAdd(rows.counts + row * BINS + bin, static_cast<int>(counts[bin]));
        if (weights[bin]) atomicAdd(rows.weights + row * BINS + bin, static_cast<u64>(weights[bin]));
    }
}

// ---------------------------------------------------------------- scores

// List the tokens of a warp's group whose bit is set: their distances and ids.
__device__ void list_tokens(const Rows& rows, long long row, u32 listed, const float (&distances)[PER_LANE], int first_token) {
    const int lane = threadIdx.x % 32, count = __popc(listed);
    int place = count;  // inclusive sum over the lanes
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, place, step);
        if (lane >= step) place += other;
    }
    const int total = __shfl_sync(ALL_LANES, place, 31);
    if (!total) return;
    int base = lane ? 0 : atomicAdd(rows.num_listed + row, total);
    place += __shfl_sync(ALL_LANES, base, 0) - count;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        if (!(listed >> i & 1)) continue;
        if (place < MAX_LISTED) {
            rows.listed_bits[row * MAX_LISTED + place] = __float_as_int(distances[i]);
            rows.listed_tokens[row * MAX_LISTED + place] = first_token + i * 32 + lane;
        }
        place++;
    }
}

// Return a bit for each distance in the bins [first, last], or in kth.
__device__ u32 is_between(const float (&distances)[PER_LANE], int first, int last, int kth) {
    u32 between = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int bin = bin_of(distances[i]);
        if (((bin >= first && bin <= last) || bin == kth) && distances[i] < INFINITE) between |= 1u << i;
    }
    return between;
}

// A warp at a group: find the best token among those that are certainly kept, and list those near the cuts.
extern "C" __global__ void __launch_bounds__(THREADS) score_tokens(const Rows rows) {
    wait_for_inputs();
    const long long row = blockIdx.x / rows.num_chunks;
    const int chunk = blockIdx.x % rows.num_chunks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float temperature = rows.temperatures[row], top = rows.highest[row], reach = rows.reach[row];
    const int first = rows.cut_bins[row * 4], last = rows.cut_bins[row * 4 + 1], kth = rows.cut_bins[row * 4 + 2];
    const bool truncates = first < BINS, is_greedy = temperature == 0.0f;
    const u32 low = rows.keys[row * 2], high = rows.keys[row * 2 + 1];
    const float inverse = is_greedy ? 1.0f : 1.0f / temperature;
    const float kept = truncates ? __int_as_float(edge_bits(first)) : INFINITE;  // nearer tokens are certainly kept
    const LOGIT* logits = rows.logits + row * rows.row_stride;
    const int end = min((chunk + 1) * (CHUNK / GROUP), rows.num_maxima);
    for (int group = chunk * (CHUNK / GROUP) + warp; group < end; group += WARPS) {
        const int first_token = group * GROUP;
        const float nearest = top - rows.maxima[row * rows.num_maxima + group];
        const bool has_listed = truncates && bin_of(nearest) <= max(last, kth);
        // Noise cannot lift a token from farther away above the likeliest token, which is always kept.
        const bool may_win = nearest <= SPAN * temperature && nearest < kept && nearest <= -reach;
        float score = -INFINITE;
        int winner = rows.vocab_size;
        if (has_listed || may_win) {
            float distances[PER_LANE];
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) {
                const int token = first_token + i * 32 + lane;
                distances[i] = token < rows.vocab_size ? top - to_float(logits[token]) : INFINITE;
            }
            if (has_listed) list_tokens(rows, row, is_between(distances, first, last, kth), distances, first_token);
            if (may_win) {
                float most[PER_LANE], best_most = -INFINITE;
                int best_i = -1;
#pragma unroll
                for (int i = 0; i < PER_LANE; i++) {
                    const bool is_kept = distances[i] < kept && distances[i] <= -reach;
                    const float noise = is_greedy ? 0.0f : most_noise(hash(low, high, first_token + i * 32 + lane));
                    most[i] = is_kept ? noise - distances[i] * inverse : -INFINITE;
                    if (most[i] > best_most) best_most = most[i], best_i = i;
                }
                if (best_i >= 0) {
                    winner = first_token + best_i * 32 + lane;
                    score = is_greedy ? best_most
                                      : gumbel(hash(low, high, winner)) - (top - to_float(logits[winner])) * inverse;
                }
                float bound = score;  // the warp's best score so far
#pragma unroll
                for (int step = 16; step; step /= 2) bound = fmaxf(bound, __shfl_xor_sync(ALL_LANES, bound, step));
                if (!is_greedy && best_most + ROUNDING >= bound) {
#pragma unroll
                    for (int i = 0; i < PER_LANE; i++) {
                        if (i == best_i || !(most[i] + ROUNDING >= bound) || most[i] == -INFINITE) continue;
                        const int token = first_token + i * 32 + lane;
                        const float exact = gumbel(hash(low, high, token)) - distances[i] * inverse;
                        if (is_better(exact, token, score, winner)) score = exact, winner = token;
                    }
                }
                take_best_of_warp(score, winner);
            }
        }
        if (lane == 0) {
            rows.best[row * rows.num_maxima + group] = score;
            rows.best_token[row * rows.num_maxima + group] = winner;
        }
    }
}

// ---------------------------------------------------------------- the best token of a row

// `shared`: WARPS numbers, which the call before the last one may have used, too.
__device__ u64 sum_of_block(u64 value, u64* shared) {
#pragma unroll
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    u64 total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) total += shared[warp];
    return total;
}

// The tokens of a row near its cuts: listed, or, if the list is too short, all of them, read again for each sum.
struct Between {
    const Rows& rows;
    const LOGIT* logits;
    u64* shared;  // 2 * WARPS
    float top, scale;
    bool is_listed;
    int num_listed, parity;
    int bits[PER_THREAD];  // of the listed distances; beyond every limit where this thread has no more tokens

    __device__ u64 sum_within(int below, int limit, float edge, bool weigh) {
        u64 sum = 0;
        if (is_listed) {
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) {
                if (i * THREADS >= num_listed) break;
                sum += term(bits[i], below, limit, edge, weigh);
            }
        } else {
            for (int token = threadIdx.x; token < rows.vocab_size; token += THREADS)
                sum += term(__float_as_int(top - to_float(logits[token])), below, limit, edge, weigh);
        }
        parity ^= WARPS;
        return sum_of_block(sum, shared + parity);
    }

    __device__ u64 term(int distance, int below, int limit, float edge, bool weigh) const {
        if (distance <= below || distance > limit) return 0;
        return weigh ? static_cast<u64>(weight(edge, __int_as_float(distance), scale) * FIXED_ONE) : 1;
    }

    // Return the least distance in (below, limit] within which the sum reaches `wanted`, or `limit`.
    __device__ int reach(int below, int limit, float edge, bool weigh, double wanted) {
        int low = below;
        while (limit - low > 1) {
            const int middle = low + (limit - low) / 2;
            if (static_cast<double>(sum_within(below, middle, edge, weigh)) >= wanted) limit = middle;
            else low = middle;
        }
        return limit;
    }
};

// Return the bits of the largest distance that is kept, for a row that truncates.
__device__ int exact_cut(Between& between, long long row, float temperature) {
    const Rows& rows = between.rows;
    const int first = rows.cut_bins[row * 4], last = rows.cut_bins[row * 4 + 1], kth = rows.cut_bins[row * 4 + 2];
    const double before_first = rows.cut_weights[row * 3], before_kth = rows.cut_weights[row * 3 + 1];
    double whole = rows.cut_weights[row * 3 + 2];
    int cut = last_bits(last);
    const float top_p = rows.top_p[row];
    if (kth >= 0) {
        const int below = edge_bits(kth) - 1;
        const float edge = __int_as_float(edge_bits(kth));
        const int within = between.reach(below, last_bits(kth), edge, false, rows.top_k[row] - rows.cut_bins[row * 4 + 3]);
        if (top_p < 1.0f)
            whole = before_kth + between.sum_within(below, within, edge, true) / static_cast<double>(FIXED_ONE) *
                                     weight(0.0f, edge, between.scale);
        cut = min(cut, within);
    }
    if (top_p < 1.0f) {
        const float edge = __int_as_float(edge_bits(first));
        const double wanted = (whole * top_p - before_first) * FIXED_ONE / weight(0.0f, edge, between.scale);
        cut = between.reach(edge_bits(first) - 1, cut, edge, true, wanted);
    }
    return min(cut, __float_as_int(fabsf(rows.reach[row])));  // -0.0f would be the smallest integer
}

__device__ void record_token(const Rows& rows, long long row, int token) {
    const int flag = rows.flags[row];
    if (flag & PENALTIES) rows.occurrences[static_cast<long long>(rows.slots[row]) * rows.vocab_size + token] += 1;
    if (flag & WORDS) {
        int* recent = rows.recent + static_cast<long long>(rows.slots[row]) * rows.word_tokens;
        for (int place = rows.word_tokens - 1; place > 0; place--) recent[place] = recent[place - 1];
        recent[0] = token;
    }
}

// One program a row: compare the tokens between the cuts exactly, choose the best token and record it.
extern "C" __global__ void __launch_bounds__(THREADS) choose_best(const Rows rows) {
    __shared__ u64 sums[2 * WARPS];
    __shared__ float scores[WARPS];
    __shared__ int tokens[WARPS];
    wait_for_inputs();
    const long long row = blockIdx.x;
    const float top = rows.highest[row], temperature = rows.temperatures[row];
    float score = -INFINITE;
    int token = rows.vocab_size;
    for (int group = threadIdx.x; group < rows.num_maxima; group += THREADS) {
        const float other = rows.best[row * rows.num_maxima + group];
        const int other_token = rows.best_token[row * rows.num_maxima + group];
        if (is_better(other, other_token, score, token)) score = other, token = other_token;
    }
    const int first = rows.cut_bins[row * 4];
    if (first < BINS && top == top) {
        const int num_listed = rows.num_listed[row];
        Between between{rows, rows.logits + row * rows.row_stride, sums, top, scale_of(temperature), num_listed <= MAX_LISTED,
                        num_listed, 0};
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            const int place = i * THREADS + threadIdx.x;
            between.bits[i] = between.is_listed && place < num_listed ? rows.listed_bits[row * MAX_LISTED + place] : 0x7FFFFFFF;
        }
        const int cut = exact_cut(between, row, temperature), below = edge_bits(first) - 1;
        const u32 low = rows.keys[row * 2], high = rows.keys[row * 2 + 1];
        const float inverse = 1.0f / temperature;
        const int size = between.is_listed ? num_listed : rows.vocab_size;
        for (int place = threadIdx.x; place < size; place += THREADS) {
            const int other = between.is_listed ? rows.listed_tokens[row * MAX_LISTED + place] : place;
            const int bits = between.is_listed ? rows.listed_bits[row * MAX_LISTED + place]
                                               : __float_as_int(top - to_float(between.logits[place]));
            if (bits <= below || bits > cut || bits == __float_as_int(INFINITE)) continue;
            const float exact = gumbel(hash(low, high, other)) - __int_as_float(bits) * inverse;
            if (is_better(exact, other, score, token)) score = exact, token = other;
        }
    }
    take_best_of_warp(score, token);
    if (threadIdx.x % 32 == 0) scores[threadIdx.x / 32] = score, tokens[threadIdx.x / 32] = token;
    __syncthreads();
    if (threadIdx.x) return;
    for (int warp = 1; warp < WARPS; warp++)
        if (is_better(scores[warp], tokens[warp], score, token)) score = scores[warp], token = tokens[warp];
    const bool is_valid = top == top;
    rows.chosen[row] = is_valid ? token : -1;
    if (is_valid && rows.flags) record_token(rows, row, token);
}
