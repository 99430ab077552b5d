// Attention, in float32, of runs of tokens to those before them in the cache and to themselves.
#pragma once

#include "attention.h"
#include "elements.h"
#include "isa.h"
#include "kernels.h"
#include "operands.h"
#include "prefetch.h"
#include "threads.h"

namespace qllm {
namespace {

// A sequence's queries are taken a few at a time, its keys a panel at a time, from its first token
// on: what is summed, and in which order, does not depend on the runs in which the tokens come.
constexpr int64_t QUERIES = 4;
constexpr int64_t PART_QUERIES = 16;  // that a thread takes at once
constexpr int64_t KEY_BLOCK = 512;    // tokens whose keys, or values, meet all of those in turn
constexpr int64_t KEY_VECTORS = WIDTH == 16 ? 4 : 2;
constexpr int64_t KEYS = KEY_VECTORS * WIDTH;
constexpr int64_t SHARED_BYTES = 1 << 20;  // of keys and values, for each thread; a head's at least

// A run of tokens of one sequence, some heads of keys and values of which the threads share:
// keys (heads, panels, dim, KEYS), values (heads, length, width), in float32. Where the cache holds
// integers these are what runs of RUN tokens stand for once they are quantized, and `recent_…` has
// the tokens from `recent` on as they come, which those of the same run of RUN see. There are none
// of the tokens in front of `begin`, a multiple of RUN, which nothing that is asked for sees.
struct Sequence {
    int64_t row, token, past, length;  // of the cache; the first new one; those before; all
    int64_t asked, result;             // the first position that is asked for; its row of y
    int64_t begin, count;              // the first token that is shared; how many are
    int64_t kv_head, panels, width;    // the first head that is shared
    int64_t recent, recent_panels;
    float *keys, *values, *recent_keys, *recent_values;
};

// The run of a sequence: whose tokens it has, and which of them count.
static Sequence sequence_of(const Attend &a, int64_t index) {
    Sequence s = {};
    s.row = a.rows[index], s.token = a.starts[index], s.past = a.positions[s.token];
    s.length = s.past + a.starts[index + 1] - s.token;
    s.asked = a.last ? s.length - 1 : s.past;
    s.result = a.last ? index : s.token;
    s.begin = smaller(s.past, unseen(a.window, s.asked)) / RUN * RUN;
    s.count = s.length - s.begin;
    return s;
}

// A key or value (dim,) of a head of the token j, from the cache or, where it is new, from qkv; as
// the cache's type has it.
static void load_token(const Attend &a, const Sequence &s, int64_t kv, int64_t j, bool is_value,
                       float *head) {
    void *held = is_value ? a.values : a.keys;
    const int64_t capacity = a.bits == 16 ? a.capacity : RUN;
    const int64_t at = ((s.row * a.kv_heads + kv) * capacity + j % capacity) * a.dim;
    if (j < s.past) {
        for (int64_t d = 0; d < a.dim; d += WIDTH)
            store_as(head, d, FLOAT32, a.dim - d, load_as(held, at + d, a.type, a.dim - d));
        return;
    }
    const int64_t token = s.token + j - s.past;
    load_head(head, a, token, a.heads + (is_value ? a.kv_heads : 0) + kv);
    if (!is_value) rotate(head, a, token);
    alignas(64) char few[WIDTH * 4];
    for (int64_t d = 0; d < a.dim; d += WIDTH) {
        store_as(few, 0, a.type, a.dim - d, load_as(head, d, FLOAT32, a.dim - d));
        store_as(head, d, FLOAT32, a.dim - d, load_as(few, 0, a.type, a.dim - d));
    }
}

// Has a head, `index`, of some tokens, which lie far apart, in the caches.
static void fetch_heads(const Attend &a, int64_t token, int64_t index, int64_t tokens) {
    const int64_t size = bytes_of(a.type);
    const int64_t stride = (a.heads + 2 * a.kv_heads) * a.dim * size;
    fetch_rows(static_cast<const char *>(a.qkv) + token * stride + index * a.dim * size,
               stride, a.dim * size, tokens);
}

// Up to WIDTH keys, `width` apart, to their places among what is shared, and zeros where there are
// fewer: from token j on, a multiple of WIDTH that is counted from a panel's first token.
static void share_keys(const Attend &a, float *keys, int64_t j, int64_t count, const float *heads) {
    float *to = keys + j / KEYS * a.dim * KEYS + j % KEYS;
    for (int64_t d = 0; d < a.dim; d += WIDTH, to += WIDTH * KEYS) {
        VF square[WIDTH];
        for (int64_t t = 0; t < WIDTH; t++)
            square[t] = t < count ? load_f(heads + t * a.width + d) : set_f(0);
        transpose(square);
        for (int64_t i = 0; i < smaller(WIDTH, a.dim - d); i++) store_f(to + i * KEYS, square[i]);
    }
}

// Keys and values of RUN tokens to what is shared, and the new ones among them to the cache.
static void share_run(const Attend &a, const Sequence &s, int64_t index, int64_t run, float *head) {
    const int64_t kv = s.kv_head + index, first = run * RUN, end = smaller(first + RUN, s.length);
    float *keys = s.keys + index * s.panels * a.dim * KEYS;
    float *values = s.values + index * s.count * s.width;
    if (const int64_t next = first > s.past ? first : s.past; next < end) {
        fetch_heads(a, s.token + next - s.past, a.heads + kv, end - next);
        fetch_heads(a, s.token + next - s.past, a.heads + a.kv_heads + kv, end - next);
    }
    // `key_of(j, to)` and `value_of(j, to)` of the run's tokens to what is shared, tokens being
    // counted from `begin` there; a panel is filled up.
    const auto share = [&](float *all_keys, float *all_values, int64_t begin, const auto &key_of,
                           const auto &value_of) {
        const int64_t filled = first + (end - first + KEYS - 1) / KEYS * KEYS;
        for (int64_t j = first; j < filled; j += WIDTH) {
            const int64_t count = smaller(WIDTH, end - j);
            for (int64_t t = 0; t < count; t++) {
                float *value = all_values + (j + t - begin) * s.width;
                key_of(j + t, head + t * a.width);
                value_of(j + t, value);
                for (int64_t d = a.dim; d < s.width; d++) value[d] = 0;
            }
            share_keys(a, all_keys, j - begin, count, head);
        }
    };
    const auto load_key = [&](int64_t j, float *to) { load_token(a, s, kv, j, false, to); };
    const auto load_value = [&](int64_t j, float *to) { load_token(a, s, kv, j, true, to); };
    if (a.bits == 16) {
        const int64_t at = (s.row * a.kv_heads + kv) * a.capacity;
        const auto keep = [&](void *cache, int64_t j, const float *from) {
            if (j >= s.past) store_head(from, a, cache, (at + j % a.capacity) * a.dim);
        };
        share(
            keys, values, s.begin,
            [&](int64_t j, float *to) { load_key(j, to), keep(a.keys, j, to); },
            [&](int64_t j, float *to) { load_value(j, to), keep(a.values, j, to); });
        return;
    }
    const Codes c = codes_of(a, s.row, kv, run);
    if (first >= s.recent) {
        float *recent_keys = s.recent_keys + index * s.recent_panels * a.dim * KEYS;
        float *recent_values = s.recent_values + index * s.recent_panels * KEYS * s.width;
        float *run_keys = head + WIDTH * a.width, *run_values = run_keys + RUN * a.dim;
        const auto copy = [&](float *to, const float *from) {
            for (int64_t d = 0; d < a.dim; d++) to[d] = from[d];
        };
        share(
            recent_keys, recent_values, s.recent,
            [&](int64_t j, float *to) {
                load_key(j, to), copy(run_keys + (j - first) * a.dim, to);
            },
            [&](int64_t j, float *to) {
                load_value(j, to), copy(run_values + (j - first) * a.dim, to);
            });
        if (end < first + RUN) return;
        quantize_run(a, c, run_keys, run_values);
    }
    share(
        keys, values, s.begin,
        [&](int64_t j, float *to) {
            for (int64_t d = 0; d < a.dim; d++) to[d] = key_at(a, c, d, j - first);
        },
        [&](int64_t j, float *to) {
            for (int64_t d = 0; d < a.dim; d++) to[d] = value_at(a, c, d, j - first);
        });
}

// The new tokens of the last run of RUN to where the cache has them as they came.
static void store_recent(const Attend &a, const Sequence &s, int64_t index, float *head) {
    const int64_t kv = s.kv_head + index, first = (s.length - 1) / RUN * RUN;
    for (int64_t j = first > s.past ? first : s.past; j < s.length; j++) {
        const int64_t at = ((s.row * a.kv_heads + kv) * RUN + j % RUN) * a.dim;
        load_token(a, s, kv, j, false, head);
        store_head(head, a, a.keys, at);
        load_token(a, s, kv, j, true, head);
        store_head(head, a, a.values, at);
    }
}

// The scores of QUERIES queries (each `dim` apart) and a panel of keys.
static void score_panel(const float *queries, int64_t dim, const float *keys, float *scores,
                        int64_t stride) {
    VF sums[QUERIES][KEY_VECTORS];
    for (int64_t q = 0; q < QUERIES; q++)
        for (int64_t v = 0; v < KEY_VECTORS; v++) sums[q][v] = set_f(0);
    for (int64_t d = 0; d < dim; d++, keys += KEYS) {
        VF key[KEY_VECTORS];
        for (int64_t v = 0; v < KEY_VECTORS; v++) key[v] = load_f(keys + v * WIDTH);
        for (int64_t q = 0; q < QUERIES; q++) {
            VF value = set_f(queries[q * dim + d]);
            for (int64_t v = 0; v < KEY_VECTORS; v++)
                sums[q][v] = add_product(sums[q][v], value, key[v]);
        }
    }
    for (int64_t q = 0; q < QUERIES; q++)
        for (int64_t v = 0; v < KEY_VECTORS; v++)
            store_f(scores + q * stride + v * WIDTH, sums[q][v]);
}

// Adds the values of `length` tokens, weighted for QUERIES queries: KEY_VECTORS vectors
// of channels.
static void weigh_values(const float *weights, int64_t stride, int64_t length, const float *values,
                         int64_t width, float (*out)[KEYS]) {
    VF sums[QUERIES][KEY_VECTORS];
    for (int64_t q = 0; q < QUERIES; q++)
        for (int64_t v = 0; v < KEY_VECTORS; v++) sums[q][v] = load_f(out[q] + v * WIDTH);
    for (int64_t j = 0; j < length; j++, values += width) {
        VF value[KEY_VECTORS];
        for (int64_t v = 0; v < KEY_VECTORS; v++) value[v] = load_f(values + v * WIDTH);
        for (int64_t q = 0; q < QUERIES; q++) {
            VF weight = set_f(weights[q * stride + j]);
            for (int64_t v = 0; v < KEY_VECTORS; v++)
                sums[q][v] = add_product(sums[q][v], weight, value[v]);
        }
    }
    for (int64_t q = 0; q < QUERIES; q++)
        for (int64_t v = 0; v < KEY_VECTORS; v++) store_f(out[q] + v * WIDTH, sums[q][v]);
}

// Up to QUERIES queries of one head, from `position` on; the last one stands for those missing.
struct Queries {
    int64_t position, count;
    int64_t begin;  // panels in front of it are not seen by any
    int64_t length() const { return position + count; }
    int64_t position_of(int64_t q) const { return position + (q < count ? q : count - 1); }
};

// The queries of one head, of those from `start` on, a multiple of PART_QUERIES, to `end`, that are
// asked for. All of them meet a block of keys, or values, while it is in the second cache: those of
// a very long sequence would come from memory for each few.
static void attend_part(const Attend &a, const Sequence &s, int64_t head, int64_t start,
                        int64_t end, float *queries, float *scores) {
    const int64_t stride = s.panels * KEYS, kv = head / (a.heads / a.kv_heads) - s.kv_head;
    const float slope = a.slopes ? a.slopes[head] : 0;
    Queries few[PART_QUERIES / QUERIES];
    int64_t count = 0;
    for (int64_t first = start; first < end; first += QUERIES) {
        const int64_t position = first > s.asked ? first : s.asked;
        const int64_t stop = smaller(first + QUERIES, end);
        if (position < stop)
            few[count++] = {position, stop - position, unseen(a.window, position) / KEYS * KEYS};
    }
    if (count == 0) return;
    const int64_t begin = few[0].begin, length = few[count - 1].length();
    fetch_heads(a, s.token + few[0].position - s.past, head, length - few[0].position);
    // Tokens that are seen as they came, if those before them are integers: all are of one run.
    const int64_t own = a.bits == 16 ? length : start / RUN * RUN;
    const float *keys = s.keys + kv * s.panels * a.dim * KEYS;
    const float *values = s.values + kv * s.count * s.width;
    const float *own_keys = nullptr, *own_values = nullptr;
    if (a.bits != 16) {
        const int64_t first = kv * s.recent_panels * KEYS + own - s.recent;
        own_keys = s.recent_keys + first * a.dim;
        own_values = s.recent_values + first * s.width;
    }
    for (int64_t i = 0; i < count * QUERIES; i++) {
        const int64_t token = s.token + few[i / QUERIES].position_of(i % QUERIES) - s.past;
        load_head(queries + i * a.dim, a, token, head);
        rotate(queries + i * a.dim, a, token);
    }
    // part(i, from, stop) of the tokens that the i-th few see, a block of tokens after the other.
    const auto by_blocks = [&](const auto &part) {
        for (int64_t j = begin, stop; j < length; j = stop) {
            stop = smaller(j + KEY_BLOCK, j < own ? own : length);
            for (int64_t i = 0; i < count; i++) {
                const int64_t from = j > few[i].begin ? j : few[i].begin;
                if (from < smaller(stop, few[i].length()))
                    part(i, from, smaller(stop, few[i].length()));
            }
        }
    };
    by_blocks([&](int64_t i, int64_t from, int64_t stop) {
        const float *panels =
            from < own ? keys + (from - s.begin) * a.dim : own_keys + (from - own) * a.dim;
        float *row = scores + i * QUERIES * stride + from - s.begin;
        for (int64_t j = 0; j < stop - from; j += KEYS)
            score_panel(queries + i * QUERIES * a.dim, a.dim, panels + j * a.dim, row + j, stride);
    });
    float share[PART_QUERIES];
    for (int64_t i = 0; i < count * QUERIES; i++) {
        float *row = scores + i * stride;
        const Queries &these = few[i / QUERIES];
        const int64_t position = these.position_of(i % QUERIES);
        const int64_t first = unseen(a.window, position), seen = position + 1 - first;
        float *seen_row = row + first - s.begin;
        const float scale = cap_scores(a, seen_row, seen);
        float m_i = scale_scores(seen_row, seen, scale, slope, first - position);
        share[i] = 1 / exponents(seen_row, seen, &m_i, a.sinks ? a.sinks + head : nullptr);
        // Keys in front of the window and behind the query, and the panel's filling, weigh nothing.
        for (int64_t j = these.begin; j < first; j++) row[j - s.begin] = 0;
        for (int64_t j = position + 1; j < these.length(); j++) row[j - s.begin] = 0;
    }
    const int64_t y_stride = a.heads * a.dim * bytes_of(a.type);
    const int64_t first_result = s.result + few[0].position - s.asked;
    prefetch_rows<true>(static_cast<char *>(a.y) + first_result * y_stride +
                            head * (y_stride / a.heads),
                        y_stride, y_stride / a.heads, length - few[0].position);
    for (int64_t d = 0; d < a.dim; d += KEYS) {
        alignas(64) float out[PART_QUERIES][KEYS] = {};
        by_blocks([&](int64_t i, int64_t from, int64_t stop) {
            const float *block = from < own ? values + (from - s.begin) * s.width
                                            : own_values + (from - own) * s.width;
            weigh_values(scores + i * QUERIES * stride + from - s.begin, stride, stop - from,
                         block + d, s.width, out + i * QUERIES);
        });
        for (int64_t i = 0; i < count * QUERIES; i++) {
            if (i % QUERIES >= few[i / QUERIES].count) continue;
            const int64_t result = s.result + few[i / QUERIES].position_of(i % QUERIES) - s.asked;
            for (int64_t v = 0; v < KEYS && d + v < a.dim; v += WIDTH)
                store_as(a.y, (result * a.heads + head) * a.dim + d + v, a.type, a.dim - d - v,
                         mul_f(load_f(out[i] + v), set_f(share[i])));
        }
    }
}

// The run of tokens of one sequence: a few heads at a time, so that their keys and values stay in
// the caches.
static Status attend_run(const Attend &a, int64_t index) {
    Sequence s = sequence_of(a, index);
    const int64_t shared = a.heads / a.kv_heads;
    s.width = (a.dim + KEYS - 1) / KEYS * KEYS;
    s.panels = (s.count + KEYS - 1) / KEYS;
    s.recent = a.bits == 16 ? s.length : s.past / RUN * RUN;
    s.recent_panels = (s.length - s.recent + KEYS - 1) / KEYS;
    const int64_t keys = s.panels * a.dim * KEYS, values = s.count * s.width;
    const int64_t recent = s.recent_panels * KEYS * (a.dim + s.width);
    const int64_t fitting = max_threads() * SHARED_BYTES / 4 / (keys + values + recent);
    const int64_t at_once = fitting < 1 ? 1 : smaller(fitting, a.kv_heads);
    const int64_t queries = (PART_QUERIES * a.dim + 15) / 16 * 16;
    const int64_t run = WIDTH * a.width + (a.bits == 16 ? 0 : 2 * RUN * a.dim);
    int64_t each = queries + PART_QUERIES * s.panels * KEYS + 16;
    each = each > run ? each : run;
    const int64_t in_all = at_once * (keys + values + recent);
    float *memory = static_cast<float *>(scratch(size_t((in_all + each * max_threads()) * 4)));
    if (!memory) return Status::NO_MEMORY;
    s.keys = memory;
    s.values = s.keys + at_once * keys;
    s.recent_keys = s.values + at_once * values;
    s.recent_values = s.recent_keys + at_once * s.recent_panels * KEYS * a.dim;
    auto own = [=](int64_t thread) { return memory + in_all + thread * each; };
    const int64_t runs = (s.count + RUN - 1) / RUN;
    // Cuts are where positions say, not where this run of tokens begins.
    const int64_t before = s.asked / PART_QUERIES * PART_QUERIES;
    const int64_t parts = (s.length - before + PART_QUERIES - 1) / PART_QUERIES;
    for (s.kv_head = 0; s.kv_head < a.kv_heads; s.kv_head += at_once) {
        const int64_t heads = smaller(at_once, a.kv_heads - s.kv_head);
        for_each(heads * runs, true, [&](int64_t i, int64_t thread) {
            share_run(a, s, i / runs, s.begin / RUN + i % runs, own(thread));
        });
        // A head's rows, which are longer the later they are, in turn with the other heads'.
        for_each(heads * shared * parts, true, [&](int64_t i, int64_t thread) {
            const int64_t head = s.kv_head * shared + i / parts;
            const int64_t start = before + i % parts * PART_QUERIES;
            const int64_t end = smaller(start + PART_QUERIES, s.length);
            attend_part(a, s, head, start, end, own(thread), own(thread) + queries);
        });
        if (a.bits != 16)
            for_each(heads, false, [&](int64_t i, int64_t thread) {
                store_recent(a, s, i, own(thread));
            });
    }
    return Status::OK;
}

static Status attend_prefill(const Attend &a) {
    for (int64_t i = 0; i < a.sequences; i++)
        if (attend_run(a, i) != Status::OK) return Status::NO_MEMORY;
    return Status::OK;
}

}  // namespace
}  // namespace qllm
