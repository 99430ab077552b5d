// The C interface of the CPU kernels, and what every path implements.
//
// A path is one instruction set: its file is compiled with its own flags and fills a `Path`, and
// `dispatch.cpp` calls the best that the machine has. Files of paths include no C++ library
// headers with code in them: a shared inline function, compiled once with AVX-512, would be
// linked into the others.
#pragma once

#include <cstddef>
#include <cstdint>

#define INLINE __attribute__((always_inline))

namespace qllm {

enum Type : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// Of scales and offsets, besides: products of float32 and integers of 8 bits. And of scales without
// offsets: powers of two.
constexpr int64_t FACTORED = 3, POWERS = 4;

// How a linear layer treats its activations.
enum Mode : int64_t {
    WEIGHT_ONLY = 0,       // as integers of 16 or 32 bits, one scale per block of inputs
    WEIGHT_ONLY_INT8 = 1,  // as int8, one scale per block of inputs
    INT8_DYNAMIC = 2,      // as int8, one scale per row
    INT8_STATIC = 3,       // as int8, one scale for all
};

// The layout of a weight (N, K) of b bits in groups of g:
//
//   panels of LANES output channels (the last is filled up with zeros), in them K blocks of K_BLOCK
//   inputs. A group of inputs starts a K block and is filled up with zeros to whole K blocks; but
//   groups of 16 inputs lie two to a K block.
//
//   q       uint8 (panels, K blocks, b, 64)     a K block's bits in planes: 8 = 8, 7 = 4 + 2 + 1, …
//   levels  uint8 (16,), where the integers of a weight of 5 to 8 bits are 16 different ones at the
//           most: q then has 4 bits, which level it is
//   scales  float16 or float32 (panels, groups, LANES)
//   zeros   uint8 (panels, groups, LANES), none for the symmetric scheme
//   offsets of the type and shape of scales in place of zeros: a weight is q scale + offset
//
// In groups of 16 or 32, float32 scales may be FACTORED: bytes (panels, parts, 4 + C, LANES), of
// each part of C = 256 / g groups the factors, in float32, then an integer plus 128 for each group.
// Or POWERS: bytes (panels, groups, LANES), the exponents of float32.
//
// A plane of p bits takes p vectors of 64 bytes for the 8 steps of a K block, a step being 4 inputs
// of all lanes: byte 4 lane + i of vector v holds input i of steps v 8/p + j at bit j p.
constexpr int64_t LANES = 16;
constexpr int64_t K_BLOCK = 32;
constexpr int64_t STEP = 4;
constexpr int64_t HALF_K_BLOCK = K_BLOCK / 2;
constexpr int64_t LEVEL_BITS = 4;

struct Linear {
    int64_t rows, in, out;    // M, K, N
    int64_t bits, group;      // the group is K where there is one per channel
    int64_t mode;             // Mode
    int64_t prefill;          // or a step of decode: arithmetic may differ, rows may not count
    const void *x;            // (M, K), its rows x_stride elements apart
    int64_t x_type, x_stride;
    void *y;                  // (M, N) in the type of x
    const uint8_t *q;
    const uint8_t *levels;    // or null
    const void *scales;
    int64_t scale_type;
    const uint8_t *zeros;     // or null
    const void *offsets;      // or null
    const void *bias;         // (N,) in the type of x, or null
    const float *input_scale; // of INT8_STATIC

    int64_t held_bits() const { return levels ? LEVEL_BITS : bits; }
};

// A weight as rows of bits, `qllm.quant.packing`'s format, and in the kernels' layout.
struct Packing {
    int64_t in, out, bits, group;
    uint8_t *rows;            // uint8 (N, row_bytes)
    int64_t row_bytes;
    uint8_t *row_scales;      // (N, G), elements of scale_bytes
    uint8_t *row_zeros;       // uint8 (N, G) or null
    int64_t scale_bytes;      // 0: scales and offsets are FACTORED or POWERS, and elsewhere
    uint8_t *q, *scales, *zeros;
    uint8_t *row_offsets, *offsets;  // of scale_bytes, or null
    const uint8_t *levels;           // or null

    int64_t held_bits() const { return levels ? LEVEL_BITS : bits; }
};

// Which integers are in rows of bits: `found` (256,) becomes 1 at each. Where they are more than 16
// not all of them may be found.
struct Distinct {
    int64_t in, out, bits;
    const uint8_t *rows;
    int64_t row_bytes;
    uint8_t *found;
};

// Float32 scales (rows, groups) as FACTORED ones; `failed` becomes 1 where some are not.
struct Factoring {
    int64_t rows, groups, group;
    const float *scales;
    uint8_t *factored;
    int64_t *failed;
};

// GGUF's types of blocks that become rows of bits, by its numbers.
enum BlockKind : int64_t {
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13,
    Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23, MXFP4 = 39
};

// Rows of GGUF's blocks as rows of bits, whose groups have 32 values, or 16.
struct Blocks {
    int64_t rows, blocks, kind;  // blocks of a row
    const uint8_t *x;            // (rows, blocks, bytes of one)
    const uint8_t *levels;       // (16,): the values of four bits, for types with a table, or null
    uint8_t *q;                  // (rows, blocks, bytes of the values of one)
    void *scales, *offsets;      // (rows, groups): the blocks' float16, or float32; offsets or null
};

// The rest of a decoder; all tensors of one call but the float32 and integer ones are of one type.

enum Kind : int64_t { RELU, GELU, GELU_TANH, SILU, RELU2, SWIGLU_OAI, SIGMOID };

// y (rows, channels) = f(x), or f(x) z where x is [x; z] (rows, 2 channels); of SWIGLU_OAI f(x, z).
struct Activate {
    int64_t rows, channels, kind, gated, type;
    const void *x;
    void *y;
};

struct Norm {  // of each row of x (rows, channels); `centered`: less its mean
    int64_t rows, channels, stride, centered, type;  // stride: of x and y, from one row to the next
    double eps, offset;             // offset is added to the weight
    // Rows come in runs of `run`, of which the first `first` take the weight's first row, the next
    // `second` its second one, `third` none, and the rest stay as they are; 0: all take the one row
    // there is.
    int64_t run, first, second, third;
    const void *x, *weight, *bias;  // weight and bias (channels,) or null; weight (2, channels)
    void *y;
};

struct Add {  // y = x + z, all (count,); or x factor, where z is null
    int64_t count, type;
    double factor;
    const void *x, *z;
    void *y;
};

struct ScaleRows {  // y = x (rows, columns), the first `scaled` columns times factors (rows,)
    int64_t rows, columns, scaled, type;
    const void *x, *factors;
    void *y;
};

struct Gate {  // y = x (rows, channels) times f(gates), of which these begin at `first`
    int64_t rows, channels, stride, first, kind, type;  // stride: from one row of gates to the next
    const void *x, *gates;
    void *y;
};

constexpr int64_t MAX_EXPERTS = 4096;
constexpr int64_t MAX_TAKEN = 32;  // tokens that an expert takes at a time in a step

// The experts that each token takes, and how much each counts: those of the largest of the softmax
// of logits, and one behind them that all take, where there is a `gate`, whose logistic function is
// its weight.
struct Route {
    int64_t rows, experts, top_k, normalizes, type;
    const void *logits;  // (rows, experts)
    const void *gate;    // (rows,), or null
    float *weights;      // (rows, top_k), one more column with a gate
    int64_t *chosen;     // likewise
};

// A call of an op that is made again: all ops have one form.
struct Call {
    int64_t (*function)(const void *);
    void *arguments;
};

// y (rows, channels): what the experts of each row of x give, times their weights, summed in
// float32 in the experts' order. The calls of each put into `given` what it makes of `taken`.
struct Experts {
    int64_t rows, channels, experts, top_k, calls_each, capacity, type;
    const void *x;
    const float *weights;   // (rows, top_k)
    const int64_t *chosen;  // likewise
    const Call *calls;      // (experts, calls_each)
    void *taken, *given;    // (capacity, channels)
    float *total;           // (rows, channels)
    void *y;
};

struct Join {  // y (rows, columns + joined) = x and the last columns of z, of `bytes` each
    int64_t rows, columns, others, joined, bytes;
    const void *x;  // (rows, columns)
    const void *z;  // (rows, others)
    void *y;
};

struct Gather {  // y (rows, gathered) = x[:, index], of elements of 2 or 4 bytes
    int64_t rows, columns, gathered, bytes;
    const void *x;           // (rows, columns)
    const int64_t *index;    // (gathered,)
    void *y;
};

struct Embed {  // row index[i] + offset of a table, `bytes` wide, for each i
    int64_t rows, table_rows, bytes, offset;
    const int64_t *index;
    const void *table;
    void *y;
};

struct EmbedPacked {  // row index[i] of a packed weight (table_rows, in), dequantized, for each i
    int64_t rows, table_rows, in, bits, group, type, scale_type;  // type: of y
    const int64_t *index;
    const uint8_t *q, *levels;             // as pack leaves them, and the rest
    const void *scales;
    const uint8_t *zeros;                  // null: 2^(bits - 1), or there are offsets
    const void *offsets;
    void *y;                               // (rows, in)

    int64_t held_bits() const { return levels ? LEVEL_BITS : bits; }
};

// Tokens attend to those before them in the cache, which their keys and values join, and to
// themselves. N tokens of some sequences lie one sequence after the other; in a decode step each
// has one.
//
// Keys and values are of the type of the activations, or integers of 8 or 4 bits: see
// qllm/ops/quantized_kv.py. Then `capacity` is of whole runs of RUN tokens, and `width` is dim
// padded to a multiple of CHANNELS. A token at position p is held at p modulo `capacity`, which may
// be less than a row's length where there is a window: see qllm/ops/kv.py.
constexpr int64_t RUN = 64;

struct Attend {
    int64_t sequences, heads, kv_heads, dim, capacity, type, bits, width;
    int64_t window;             // how many tokens a query sees, its own included; 0: all before it
    double scale, cap;          // scores are scale q k; or cap tanh(scale q k / cap), cap being > 0
    int64_t last;               // of a prefill: results are asked for of each sequence's last token
    const void *qkv;            // (N, heads + 2 kv_heads, dim)
    const int64_t *rows;        // (sequences,): of the cache
    const int64_t *starts;      // (sequences + 1,): where the tokens of each begin
    const int64_t *positions;   // (N,): of a token in its row
    const void *cos, *sin;      // (N, dim), or null for no rotation
    const float *slopes;        // (heads,): of ALiBi, or null
    const float *sinks;         // (heads,): a score that joins each softmax, or null
    void *keys, *values;        // (…, kv_heads, capacity, dim), or of bits (…, kv_heads, RUN, dim)
    void *y;                    // (N, heads, dim), or (sequences, heads, dim) of the last tokens
    uint8_t *key_codes;         // (…, kv_heads, runs, width / 4, RUN b / 8, 4)
    uint8_t *value_codes;       // (…, kv_heads, runs, RUN b / 32, width, 4)
    uint16_t *key_scales, *value_scales;  // bfloat16 (…, kv_heads, runs, width), and (…, RUN)
    uint8_t *key_zeros, *value_zeros;
};

// Whole sequences, of one length, attend to themselves; and the gradients by what they come from. A
// row of q, k and v lies a stride of elements behind the one in front of it.
struct AttendSequences {
    int64_t sequences, length, heads, kv_heads, dim, type, window;
    int64_t q_stride, k_stride, v_stride;
    double scale, cap;                       // as of Attend
    const void *q, *k, *v;                   // (sequences length, heads or kv_heads, dim)
    const float *slopes, *sinks;             // as of Attend
    void *y;                                 // (sequences length, heads, dim)
    float *stats;                            // (sequences, heads, length, 2): of each softmax
    const void *grad_y;                      // of the way back, as y, and what it makes: as q, k, v
    void *grad_q, *grad_k, *grad_v;
};

struct Dense {  // y (rows, out) = x w^T + bias
    int64_t rows, in, out, x_stride, type, decode;
    const void *x, *w, *bias;
    void *y;
};

// y (N, channels) = SiLU of a convolution of x, whose rows are a stride apart, over `kernel` tokens
// of which the last is its own; and the delta rule: see qllm/ops/reference/delta.py. `rows`,
// `starts` and `positions` are as of Attend.
struct Convolution {
    int64_t sequences, channels, stride, kernel, type;
    const void *x;
    const void *weight;  // (kernel, channels)
    const int64_t *rows, *starts, *positions;
    void *inputs;        // (…, kernel - 1, channels)
    void *y;
};

struct DeltaRule {
    int64_t sequences, key_heads, heads, key_dim, value_dim, type;
    const void *qkv;     // (N, 2 key_heads key_dim + heads value_dim)
    const void *gates;   // (N, 2 heads)
    const float *decay;  // (2, heads)
    const int64_t *rows, *starts, *positions;
    float *memory;       // (…, heads, key_dim, value_dim)
    void *y;             // (N, heads value_dim)
};

struct StepRounding {  // of a matrix (rows, in) on its grids; see `qllm.ops.rounding.Rounding`
    int64_t rows, in, groups, group, qmax, symmetric, scale_type, type;
    int64_t parts, part_stride, factor_stride;  // elements from one part or end to the next
    double rate, range_rate;
    double beta1, beta2;                     // of Lion: see `qllm.ops.reference.rounding`
    double least_scale, least, largest;      // of scales in float16, and of factors
    const void *gradients;                   // (parts, rows, in), of `type`
    float *ideal, *ideal_exp_avg;            // (rows, groups, group)
    const float *low, *high;                 // (rows, groups)
    float *factors, *factor_exp_avg;         // (2, rows, groups)
    const int64_t *perm;                     // (in,) or null
    void *matrix;                            // (rows, in), of `type`
};

struct DescendBlock {  // the best integers of some channels, one after the other
    int64_t channels, rows, qmax, stride;        // of rows of products, in elements
    const float *products;                       // (channels, channels)
    float *values;                               // (channels, rows), all of these
    const float *gradient, *scales, *low, *step_sizes;
    float *moves;
};

// What became of a call; `qllm_message` says it in words.
enum class Status : int64_t { OK = 0, NO_MEMORY = 1, BAD_INDEX = 2 };

// Every op and its arguments. What paths have, what the library exports (`qllm_` and the name), and
// the sizes that Python checks its own structures against, come from this list.
#define QLLM_OPS(OP)                               \
    OP(linear, Linear)                             \
    OP(dense, Dense)                               \
    OP(pack, Packing)                              \
    OP(unpack, Packing)                            \
    OP(distinct, Distinct)                         \
    OP(factor, Factoring)                          \
    OP(unblock, Blocks)                            \
    OP(activate, Activate)                         \
    OP(norm, Norm)                                 \
    OP(add, Add)                                   \
    OP(scale_rows, ScaleRows)                      \
    OP(gate, Gate)                                 \
    OP(causal_conv, Convolution)                   \
    OP(delta_rule, DeltaRule)                      \
    OP(route, Route)                               \
    OP(experts, Experts)                           \
    OP(gather, Gather)                             \
    OP(join, Join)                                 \
    OP(embed, Embed)                               \
    OP(embed_packed, EmbedPacked)                  \
    OP(attend, Attend)                             \
    OP(attend_prefill, Attend)                     \
    OP(attend_sequences, AttendSequences)          \
    OP(attend_sequences_backward, AttendSequences) \
    OP(step_rounding, StepRounding)                \
    OP(descend_block, DescendBlock)

struct Path {
    const char *name;
    const Path *base = nullptr;  // has what is null here
#define QLLM_FIELD(op, Arguments) Status (*op)(const Arguments &) = nullptr;
    QLLM_OPS(QLLM_FIELD)
#undef QLLM_FIELD
    int64_t (*read_all)(const uint8_t *, int64_t bytes) = nullptr;
    int64_t (*multiply_all)(int64_t rounds) = nullptr;
    bool (*self_test)() = nullptr;  // of AMX; where it does not work, this may also crash or hang
};

// A path that has every op, by the functions of its file that are called like the ops.
#define QLLM_OP(op, Arguments) op,
#define QLLM_WHOLE_PATH(name) {name, nullptr, QLLM_OPS(QLLM_OP) read_all, multiply_all}

// A library has the paths of one machine. Weak: the address of one that it lacks is null.
#define QLLM_PATH extern const Path __attribute__((weak))
QLLM_PATH scalar_path, avx2_path, avxvnni_path, avx512_path, avx512bf16_path, amx_path;
#undef QLLM_PATH

// What paths take from files of their own, of weights in groups of 16 (halves) and of all others.
// For WEIGHT_ONLY_INT8 of few bits avx2_path has another one: with more, sums in 16 bits would be
// full after every step.
constexpr int SHORT_SUM_BITS = 6;
extern Status (*const avx2_int8_linear)(const Linear &);
extern Status (*const avx2_int8_halves)(const Linear &);
extern Status (*const avx2_linear)(const Linear &);
extern Status (*const avx2_halves)(const Linear &);
extern Status (*const avxvnni_linear)(const Linear &);
extern Status (*const avxvnni_halves)(const Linear &);
extern Status (*const avx512_linear)(const Linear &);
extern Status (*const avx512_halves)(const Linear &);

// Memory of the calling thread, 64-byte aligned, kept for its next call; null where there is none.
void *scratch(size_t bytes);

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t k_blocks_of(int64_t inputs) { return (inputs + K_BLOCK - 1) / K_BLOCK; }

// How many inputs of groups of this size are filled up to whole K blocks together.
static inline int64_t filled_inputs(int64_t group) {
    return group == HALF_K_BLOCK ? K_BLOCK : group;
}

// K blocks of a row: every group's, the last group may be shorter.
static inline int64_t row_k_blocks(int64_t in, int64_t group) {
    const int64_t filled = filled_inputs(group);
    return in / filled * k_blocks_of(filled) + k_blocks_of(in % filled);
}

// Where an input is: in which K block of a row, and which input of that.
struct Place {
    int64_t k_block, input;
};
static inline Place place_of(int64_t k, int64_t group) {
    const int64_t filled = filled_inputs(group);
    return {k / filled * k_blocks_of(filled) + k % filled / K_BLOCK, k % filled % K_BLOCK};
}

}  // namespace qllm
