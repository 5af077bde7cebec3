// Few tokens through matrices, on a CPU: each product is bound by reading its weight, and each call of an operation
// would cost a small model as much as a product. Here all layers are one call and one group of threads.
//
// Matrices lie row by row, W[n, k]. Values are fp32 within a layer, rounded to the model's dtype wherever PyTorch's
// operations would have given a tensor. Every sum has one order, whatever the number of tokens and threads: a token's
// numbers do not depend on what stands beside it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TOKENS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, TOKENS = 2;
#else
constexpr int LANES = 4, TOKENS = 4;
#endif
constexpr int ROWS = 4;         // of a weight that share what is read of several tokens
constexpr long AHEAD = 1 << 12; // bytes of a weight that are asked for before they are needed

struct BFloat16 {
    uint16_t bits;
};

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef float LooseFloats __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint32_t LooseWords __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(2), may_alias));

// Vectors of fp32 that one vector of a weight opens into.
template <typename T> constexpr int PIECES = sizeof(float) / sizeof(T);

inline Floats load(const float *at) { return *(const LooseFloats *)at; }

// bf16 is the upper half of fp32
inline Floats load(const BFloat16 *at) {
    return (Floats)(__builtin_convertvector(*(const LooseHalves *)at, Words) << 16);
}

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &word, sizeof out);
    return out;
}

template <typename T> T narrow(float x);

template <> inline float narrow(float x) { return x; }

// to the nearest, ties to even
template <> inline BFloat16 narrow(float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    if (std::isnan(x))
        return {0x7fc0};
    return {uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16)};
}

template <typename T> float rounded(float x) { return widen(narrow<T>(x)); }

// halves added to each other until one number is left
template <int N> inline float sum_of(const float *lanes) {
    if constexpr (N == 1) {
        return lanes[0];
    } else {
        typedef float Half __attribute__((vector_size(N / 2 * sizeof(float)), aligned(4), may_alias));
        float halves[N / 2];
        *(Half *)halves = *(const Half *)lanes + *(const Half *)(lanes + N / 2);
        return sum_of<N / 2>(halves);
    }
}

inline float sum(Floats x) {
    float lanes[LANES];
    *(LooseFloats *)lanes = x;
    return sum_of<LANES>(lanes);
}

inline void open_up(const float *at, Floats (&out)[1]) { out[0] = load(at); }

// the numbers at even places, then those at odd ones: no number has to move to another lane
inline void open_up(const BFloat16 *at, Floats (&out)[2]) {
    Words words = *(const LooseWords *)at;
    out[0] = (Floats)(words << 16);
    out[1] = (Floats)(words & 0xffff0000);
}

// Returns x in the order in which a weight opens up: as it is, or moved to scratch.
template <typename T> const float *arranged(const float *x, long num_tokens, long k, float *scratch) {
    if (PIECES<T> == 1)
        return x;
    std::copy(x, x + num_tokens * k, scratch);
    for (long token = 0; token < num_tokens; token++)
        for (long i = token * k; i + 2 * LANES <= (token + 1) * k; i += 2 * LANES)
            for (long lane = 0; lane < LANES; lane++) {
                scratch[i + lane] = x[i + 2 * lane];
                scratch[i + LANES + lane] = x[i + 2 * lane + 1];
            }
    return scratch;
}

// sums[n][m] = weight[n] · x[m], x arranged
template <int N, int M, typename T>
__attribute__((noinline)) void tile(const T *weight, const float *x, long k, float (*sums)[TOKENS]) {
    constexpr int STEP = PIECES<T> * LANES;
    Floats parts[N][M] = {};
    long i = 0;
#pragma GCC unroll 8
    for (; i + STEP <= k; i += STEP) {
        Floats in[M][PIECES<T>];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
            for (int piece = 0; piece < PIECES<T>; piece++)
                in[m][piece] = load(x + m * k + i + piece * LANES);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const T *at = weight + n * k + i;
            __builtin_prefetch((const char *)at + AHEAD);
            Floats row[PIECES<T>];
            open_up(at, row);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
#pragma GCC unroll 2
                for (int piece = 0; piece < PIECES<T>; piece++)
                    parts[n][m] += row[piece] * in[m][piece];
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            float total = sum(parts[n][m]);
            for (long rest = i; rest < k; rest++)
                total += widen(weight[n * k + rest]) * x[m * k + rest];
            sums[n][m] = total;
        }
}

template <int N, typename T>
inline void tokens_tile(const T *weight, const float *x, long num_tokens, long k, float (*sums)[TOKENS]) {
    switch (num_tokens) {
    case 1: return tile<N, 1>(weight, x, k, sums);
    case 2: return tile<N, 2>(weight, x, k, sums);
    case 3: return tile<N, std::min(3, TOKENS)>(weight, x, k, sums);
    default: return tile<N, TOKENS>(weight, x, k, sums);
    }
}

// Calls give(row, token, x[token] · weight[row]) for rows [begin, end) and all tokens; scratch is as long as x.
template <typename T, typename Give>
inline void multiply(const T *weight, long begin, long end, long k, const float *x, long num_tokens, float *scratch,
                     Give give) {
    x = arranged<T>(x, num_tokens, k, scratch);
    float sums[ROWS][TOKENS];
    for (long row = begin; row < end;) {
        // for one token row by row: memory is read fastest in its own order
        bool is_full = num_tokens > 1 && row + ROWS <= end;
        int num_rows = is_full ? ROWS : 1;
        for (long token = 0; token < num_tokens; token += TOKENS) {
            long num = std::min<long>(TOKENS, num_tokens - token);
            if (is_full)
                tokens_tile<ROWS>(weight + row * k, x + token * k, num, k, sums);
            else
                tokens_tile<1>(weight + row * k, x + token * k, num, k, sums);
            for (int n = 0; n < num_rows; n++)
                for (int m = 0; m < num; m++)
                    give(row + n, token + m, sums[n][m]);
        }
        row += num_rows;
    }
}

struct Span {
    long begin, end;
};

// This thread's part of `count` rows, in whole tiles.
inline Span part_of(long count) {
    long num_tiles = (count + ROWS - 1) / ROWS, threads = omp_get_num_threads(), place = omp_get_thread_num();
    return {std::min(count, num_tiles * place / threads * ROWS),
            std::min(count, num_tiles * (place + 1) / threads * ROWS)};
}

template <typename T> void rms_norm(const float *x, const T *weight, long width, float eps, float *out) {
    Floats parts = {};
    long i = 0;
    for (; i + LANES <= width; i += LANES)
        parts += load(x + i) * load(x + i);
    float squares = sum(parts);
    for (; i < width; i++)
        squares += x[i] * x[i];
    float scale = 1 / std::sqrt(squares / width + eps);
    for (i = 0; i < width; i++)
        out[i] = rounded<T>(rounded<T>(x[i] * scale) * widen(weight[i]));
}

// x[i], x[i + r] turned by the i-th angle; channels from 2r on stay
template <typename T>
void rotate(const float *x, const float *cos, const float *sin, long r, long head_dim, float *out) {
    for (long i = 0; i < r; i++) {
        out[i] = rounded<T>(x[i] * cos[i] - x[i + r] * sin[i]);
        out[i + r] = rounded<T>(x[i + r] * cos[i] + x[i] * sin[i]);
    }
    std::copy(x + 2 * r, x + head_dim, out + 2 * r);
}

// softmax(q keysᵀ / √k) values for the query heads of one key head; scores has room for a number a query and position
template <typename T>
void attend(const float *q, long num_queries, const T *keys, const T *values, long num_seen, long head_dim,
            float *scores, float *scratch, float *out) {
    float scale = 1 / std::sqrt(float(head_dim));
    multiply(keys, 0, num_seen, head_dim, q, num_queries, scratch,
             [&](long place, long query, float product) { scores[query * num_seen + place] = product * scale; });
    for (long query = 0; query < num_queries; query++) {
        float *shares = scores + query * num_seen, *mixed = out + query * head_dim;
        float most = *std::max_element(shares, shares + num_seen), total = 0;
        for (long place = 0; place < num_seen; place++)
            total += shares[place] = std::exp(shares[place] - most);
        long i = 0;
        for (; i + LANES <= head_dim; i += LANES) {
            Floats parts = {};
            for (long place = 0; place < num_seen; place++)
                parts += load(values + place * head_dim + i) * shares[place];
            for (int lane = 0; lane < LANES; lane++)
                mixed[i + lane] = rounded<T>(parts[lane] / total);
        }
        for (; i < head_dim; i++) {
            float part = 0;
            for (long place = 0; place < num_seen; place++)
                part += widen(values[place * head_dim + i]) * shares[place];
            mixed[i] = rounded<T>(part / total);
        }
    }
}

struct Sizes {
    int64_t num_threads, num_layers, num_tokens, width, num_heads, num_kv_heads, head_dim, mlp_width;
    int64_t num_positions, num_angles; // rows of the tables of cosine and sine, and their length
    int64_t batch, capacity; // rows of the cache, and positions of each
    int64_t window;          // 0: none
    float eps;
};

template <typename T> struct Layer {
    const T *input_norm, *qkv, *o, *post_norm, *gate_up, *down;
};

template <typename T>
void decoder_layers(const Sizes &s, const Layer<T> *layers, const T *final_norm, T *const *all_keys,
                    T *const *all_values, const float *cos, const float *sin, const int64_t *angles,
                    const int64_t *rows, const int64_t *positions, const T *in, T *out) {
    const long t = s.num_tokens, d = s.width, k = s.head_dim, h = s.num_heads, g = s.num_kv_heads;
    const long group = h / g, num_places = h + 2 * g, r = s.num_angles;
    std::vector<float> x(t * d), heads(t * num_places * k), turned(t * h * k), mixed(t * h * k);
    std::vector<float> active(t * s.mlp_width);
    for (long i = 0; i < t * d; i++)
        x[i] = widen(in[i]);
    const long longest = 1 + *std::max_element(positions, positions + t);

#pragma omp parallel num_threads(s.num_threads)
    {
        std::vector<float> normed(t * d), scores(group * longest), scratch(t * std::max({d, h * k, k, s.mlp_width}));
        const long place = omp_get_thread_num(), threads = omp_get_num_threads();
        // a thread's part of things that come one by one
        const auto each = [&](long count, auto run) {
            for (long i = count * place / threads; i < count * (place + 1) / threads; i++)
                run(i);
        };
        const auto add = [&](long row, long token, float product) {
            float &sum = x[token * d + row];
            sum = rounded<T>(sum + rounded<T>(product));
        };
        for (long number = 0; number < s.num_layers; number++) {
            const Layer<T> &layer = layers[number];
            T *keys = all_keys[number], *values = all_values[number];
            // each thread for itself: cheaper than waiting for one that does it for all
            for (long token = 0; token < t; token++)
                rms_norm(&x[token * d], layer.input_norm, d, s.eps, &normed[token * d]);
            Span span = part_of(num_places * k);
            multiply(layer.qkv, span.begin, span.end, d, normed.data(), t, scratch.data(),
                     [&](long row, long token, float product) {
                         heads[token * num_places * k + row] = rounded<T>(product);
                     });
#pragma omp barrier
            each(t * num_places, [&](long i) {
                long token = i / num_places, head = i % num_places;
                const float *from = &heads[i * k], *c = cos + angles[token] * r, *n = sin + angles[token] * r;
                if (head < h)
                    return rotate<T>(from, c, n, r, k, &turned[(token * h + head) * k]);
                bool is_key = head < h + g;
                long kept = ((rows[token] * g + (head - h) % g) * s.capacity + positions[token]) * k;
                float *key = scratch.data();
                if (is_key)
                    rotate<T>(from, c, n, r, k, key);
                for (long channel = 0; channel < k; channel++)
                    (is_key ? keys : values)[kept + channel] = narrow<T>((is_key ? key : from)[channel]);
            });
#pragma omp barrier
            each(t * g, [&](long i) {
                long token = i / g, head = i % g, end = positions[token] + 1;
                long first = s.window ? std::max<long>(0, end - s.window) : 0;
                long kept = ((rows[token] * g + head) * s.capacity + first) * k, at = (token * h + head * group) * k;
                attend(&turned[at], group, keys + kept, values + kept, end - first, k, scores.data(), scratch.data(),
                       &mixed[at]);
            });
#pragma omp barrier
            span = part_of(d);
            multiply(layer.o, span.begin, span.end, h * k, mixed.data(), t, scratch.data(), add);
#pragma omp barrier
            for (long token = 0; token < t; token++)
                rms_norm(&x[token * d], layer.post_norm, d, s.eps, &normed[token * d]);
            span = part_of(s.mlp_width);
            multiply(layer.gate_up, span.begin, span.end, d, normed.data(), t, scratch.data(),
                     [&](long row, long token, float product) {
                         float gate = rounded<T>(product);
                         active[token * s.mlp_width + row] = rounded<T>(gate / (1 + std::exp(-gate)));
                     });
            const T *up = layer.gate_up + s.mlp_width * d;
            multiply(up, span.begin, span.end, d, normed.data(), t, scratch.data(),
                     [&](long row, long token, float product) {
                         float &out = active[token * s.mlp_width + row];
                         out = rounded<T>(out * rounded<T>(product));
                     });
#pragma omp barrier
            span = part_of(d);
            multiply(layer.down, span.begin, span.end, s.mlp_width, active.data(), t, scratch.data(), add);
#pragma omp barrier
        }
    }
    if (final_norm)
        for (long token = 0; token < t; token++)
            rms_norm(&x[token * d], final_norm, d, s.eps, &x[token * d]);
    for (long i = 0; i < t * d; i++)
        out[i] = narrow<T>(x[i]);
}

// out[t, n] = x[t, k] weightᵀ + bias; and where each token's first largest one is, if that is asked for
template <typename T>
void linear(int64_t num_threads, int64_t t, int64_t n, int64_t k, const T *x, const T *weight, const T *bias, T *out,
            int64_t *largest) {
    std::vector<float> wide(t * k);
    for (long i = 0; i < t * k; i++)
        wide[i] = widen(x[i]);
    if (largest)
        std::fill(largest, largest + t, 0);
#pragma omp parallel num_threads(num_threads)
    {
        std::vector<float> scratch(t * k);
        Span span = part_of(n);
        const auto give = [&](long row, long token, float product) {
            out[token * n + row] = narrow<T>(product + (bias ? widen(bias[row]) : 0));
        };
        multiply(weight, span.begin, span.end, k, wide.data(), t, scratch.data(), give);
        for (long token = 0; largest && token < t; token++) {
            const T *logits = out + token * n;
            // NaN counts as the largest, as PyTorch has it
            const auto is_larger = [](float one, float other) { return !(one <= other) && !std::isnan(other); };
            long best = span.begin;
            float most = -INFINITY;
            for (long row = span.begin; row < span.end; row++)
                if (is_larger(widen(logits[row]), most)) {
                    best = row;
                    most = widen(logits[row]);
                }
#pragma omp barrier
#pragma omp critical
            if (span.begin < span.end) {
                float other = widen(logits[largest[token]]);
                if (is_larger(most, other) || (!is_larger(other, most) && best < largest[token]))
                    largest[token] = best;
            }
        }
    }
}

// A token for each row of the cache: ids to logits, and the likeliest token; the row's length is counted up.
struct Ends {
    const void *embedding, *head, *bias;
    int64_t vocab_size;
};

template <typename T>
void decode_tokens(const Sizes &s, const Layer<T> *layers, const T *final_norm, T *const *keys, T *const *values,
                   const float *cos, const float *sin, const Ends &ends, const int64_t *ids, int64_t *lengths,
                   T *logits, int64_t *likeliest) {
    const long t = s.num_tokens, d = s.width;
    std::vector<T> x(t * d);
    std::vector<int64_t> rows(t);
    for (long row = 0; row < t; row++) {
        const T *from = (const T *)ends.embedding + ids[row] * d;
        std::copy(from, from + d, &x[row * d]);
        rows[row] = row;
    }
    decoder_layers(s, layers, final_norm, keys, values, cos, sin, lengths, rows.data(), lengths, x.data(), x.data());
    linear(s.num_threads, t, ends.vocab_size, d, x.data(), (const T *)ends.head, (const T *)ends.bias, logits,
           likeliest);
    for (long row = 0; row < t; row++)
        lengths[row]++;
}

bool all_below(const int64_t *numbers, int64_t count, int64_t end) {
    return std::all_of(numbers, numbers + count, [&](int64_t number) { return number >= 0 && number < end; });
}

} // namespace

// Nothing is done, and 1 returned, where a token would stand outside the cache or the tables.
#define EXPORT(T, name)                                                                                                \
    extern "C" int decoder_layers_##name(const Sizes *sizes, const void *layers, const T *final_norm, T *const *keys,  \
                                         T *const *values, const float *cos, const float *sin, const int64_t *angles,  \
                                         const int64_t *rows, const int64_t *positions, const T *in, T *out) {         \
        const int64_t t = sizes->num_tokens;                                                                           \
        if (!all_below(angles, t, sizes->num_positions) || !all_below(rows, t, sizes->batch) ||                        \
            !all_below(positions, t, sizes->capacity))                                                                 \
            return 1;                                                                                                  \
        decoder_layers(*sizes, (const Layer<T> *)layers, final_norm, keys, values, cos, sin, angles, rows, positions,  \
                       in, out);                                                                                       \
        return 0;                                                                                                      \
    }                                                                                                                  \
    extern "C" int decode_tokens_##name(const Sizes *sizes, const void *layers, const T *final_norm, T *const *keys,   \
                                        T *const *values, const float *cos, const float *sin, const Ends *ends,        \
                                        const int64_t *ids, int64_t *lengths, T *logits, int64_t *likeliest) {         \
        const int64_t t = sizes->num_tokens;                                                                           \
        if (!all_below(lengths, t, std::min(sizes->num_positions, sizes->capacity)) || t > sizes->batch ||             \
            !all_below(ids, t, ends->vocab_size))                                                                      \
            return 1;                                                                                                  \
        decode_tokens(*sizes, (const Layer<T> *)layers, final_norm, keys, values, cos, sin, *ends, ids, lengths,       \
                      logits, likeliest);                                                                              \
        return 0;                                                                                                      \
    }                                                                                                                  \
    extern "C" int linear_##name(int64_t num_threads, int64_t t, int64_t n, int64_t k, const T *x, const T *weight,    \
                                 const T *bias, T *out) {                                                              \
        linear(num_threads, t, n, k, x, weight, bias, out, nullptr);                                                   \
        return 0;                                                                                                      \
    }

EXPORT(float, float32)
EXPORT(BFloat16, bfloat16)
