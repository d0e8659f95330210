// Prefill-only pruning (POP, He et al., arXiv 2602.03295).
//
// A *full* row runs all layers. A *context* row runs only the layers below the boundary; its K/V of the skipped layers
// are projected from its state at the boundary. A row is full if its logits are requested, or its position is below
// sink_tokens, or it is at or past full_from of one of its sequences, or it is one of that sequence's deep rows.
//
// Exact skipping: where the last layers read the K/V of an earlier one, a row whose logits are not requested is of no
// use past the K and V of the last layer that stores any. That layer is the boundary then, with its own projections, and no
// other row changes. This needs no keys in the file.
//
// Deep pass: of rows whose state at the boundary was kept, the layers from there on run later, on the cells that the rows
// have. They attend to what the KV cache holds by then, and overwrite their projected K/V.

#pragma once

#include "llama.h"

#include "llama-arch.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct ggml_tensor;

struct llama_context;
struct llama_cparams;
struct llama_hparams;
struct llama_model;
struct llama_model_base;
struct llama_model_loader;
struct llama_ubatch;
struct llama_layer;
struct llama_memory_context_i;
struct llama_memory_i;

struct llm_graph_context;
struct llm_graph_params;

class llama_batch_allocr;
class llm_graph_input_pop;
class llm_graph_result;

#ifdef __cplusplus
extern "C" {
#endif

    //
    // the C ABI. setters return 0, or -1 (with an error in the log) when the value cannot be had
    // they take effect with the next llama_decode()
    //

    enum llama_pop_mode {
        LLAMA_POP_MODE_OFF     = 0, // every row runs all layers
        LLAMA_POP_MODE_CONTEXT = 1, // context rows are pruned, or leave exactly where the model allows it: its default
        LLAMA_POP_MODE_ALWAYS  = 2, // every row is pruned, the logits come from the state at the boundary
    };

    struct llama_pop_counters {
        int64_t n_context; // rows that stopped at the boundary
        int64_t n_full;    // rows that ran all layers
        int64_t n_exact;   // rows that left at the last layer that stores K/V, exactly
        int64_t n_deep;    // rows of deep passes
        int64_t n_marked;  // full rows that only llama_pop_set_deep_rows() made full
    };

    enum llama_pop_reading {
        LLAMA_POP_READING_NONE    = 0,
        LLAMA_POP_READING_SOME    = 1, // full rows, too
        LLAMA_POP_READING_CONTEXT = 2, // context rows alone: the full ones are of answers
    };

    enum llama_pop_deepen_result {
        LLAMA_POP_DEEPEN_REFUSED = -1, // nothing was done, the log says why
        LLAMA_POP_DEEPEN_FAILED  = -2, // the pass is to be done again, or the rows are to be removed
        LLAMA_POP_DEEPEN_DONE    =  0,
        LLAMA_POP_DEEPEN_ABORTED =  2, // by the abort callback: the pass is to be done again
    };

    // what a layer computes, by its row: floats [n_rows, n_cols]
    enum llama_pop_tap_kind {
        LLAMA_POP_TAP_STATE = 0, // what the layer is given
        LLAMA_POP_TAP_K     = 1, // before norm and RoPE
        LLAMA_POP_TAP_V     = 2,
        LLAMA_POP_TAP_HEADS = 3, // of its attention, before the output projection
        LLAMA_POP_TAP_MASS  = 4, // the attention that a row receives from every LLAMA_POP_TAP_STRIDE-th later one, all heads
    };

    struct llama_pop_tapped {
        int32_t kind;
        int32_t layer;
        int32_t pos; // of the first row
        int32_t n_rows;
        int32_t n_cols;
    };

    LLAMA_API int32_t llama_pop_abi(void);

    // the boundary that the file asks for, 0: the file has no POP keys, -1: the architecture cannot be pruned
    LLAMA_API int32_t llama_pop_model_boundary(const struct llama_model * model);

    // the first of the layers that store no K/V, so that rows without logits leave before them. 0: there is none
    LLAMA_API int32_t llama_pop_model_exact(const struct llama_model * model);

    LLAMA_API int32_t llama_pop_set_mode(struct llama_context * ctx, int32_t mode);
    LLAMA_API int32_t llama_pop_get_mode(const struct llama_context * ctx);

    // own projections only, 0: the file's boundary
    LLAMA_API int32_t llama_pop_set_boundary(struct llama_context * ctx, int32_t layer);
    LLAMA_API int32_t llama_pop_get_boundary(const struct llama_context * ctx);

    // the rows of this sequence at or past pos are full, -1: none by position
    LLAMA_API int32_t llama_pop_set_full_from(struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos);

    // the rows of this sequence at these n ascending positions are full. replaces the earlier ones, n = 0: none.
    // the caller chooses them, so that a row's depth may depend on its token
    LLAMA_API int32_t llama_pop_set_deep_rows(struct llama_context * ctx, llama_seq_id seq_id, const llama_pos * pos, int32_t n);

    // the rows of every sequence below position n are full, -1: as many as the file asks for
    LLAMA_API int32_t llama_pop_set_sink(struct llama_context * ctx, int32_t n_tokens);

    // from the next llama_decode() on, the state at the boundary of every row is kept while its cell lives, in host memory
    // and as F32. false: no longer, and those that were kept are dropped
    LLAMA_API int32_t llama_pop_set_keep(struct llama_context * ctx, bool keep);

    // bytes that are held for states and scores
    LLAMA_API size_t llama_pop_keep_size(const struct llama_context * ctx);

    // runs the layers from the boundary on for n rows of the sequence, at ascending positions and at most n_ubatch of them.
    // true: with the logits of the last one. refused where the state of a row is not kept, or rows that it
    // attends to have left the cache of layers with a sliding window
    LLAMA_API int32_t llama_pop_deepen(struct llama_context * ctx, llama_seq_id seq_id, const llama_pos * pos, int32_t n, bool logits);

    // while states are kept, attention is counted in the last layers below the boundary: that of every
    // LLAMA_POP_SCORE_STRIDE-th row of a prompt, and that of the question, which are the rows of the sequence at or past
    // pos. earlier questions are forgotten. -1: there is none
    LLAMA_API int32_t llama_pop_set_question(struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos);

    // what the question attends to: of each position below n, the sum over layers of the largest A/(T + mean T) of
    // any head, where A is the attention that the question pays to it and T that of all rows
    LLAMA_API int32_t llama_pop_get_scores(struct llama_context * ctx, llama_seq_id seq_id, float * scores, int32_t n);

    // whether our kernels for CPUs (ggml-cpu/pop) may compute: true at first
    LLAMA_API int32_t llama_pop_set_kernels(struct llama_context * ctx, bool kernels);

    // which rows of each llama_decode() from now on are a prompt's. their products and attention are left to these kernels
    // however few rows there are, so that no row depends on how the prompt was cut. deep passes always are
    LLAMA_API int32_t llama_pop_set_reading(struct llama_context * ctx, int32_t reading);

    // taps: each ubatch of several rows, which all run all layers, hands out what was asked for here. so
    // does a deep pass, from the boundary on. architectures whose K and V cannot be fitted hand out none
    LLAMA_API int32_t llama_pop_add_tap    (struct llama_context * ctx, int32_t kind, int32_t layer);
    LLAMA_API void    llama_pop_remove_taps(struct llama_context * ctx);

    // what the last ubatch of the last llama_decode() or deep pass hands out, until the next one
    LLAMA_API int32_t llama_pop_n_tapped   (const struct llama_context * ctx);
    LLAMA_API int32_t llama_pop_get_tapped (const struct llama_context * ctx, int32_t i, struct llama_pop_tapped * tapped);
    LLAMA_API int32_t llama_pop_read_tapped(struct llama_context * ctx, int32_t i, float * dst);

    // multiply-accumulates of a prompt of n_tokens that is read into an empty cache, at most n_ubatch of them, for the logits of
    // the last one, at the present boundary and mode; the last n_full rows are full. scans of recurrent states are not counted.
    // -1: an error
    LLAMA_API int64_t llama_pop_count_macs(struct llama_context * ctx, int32_t n_tokens, int32_t n_full);

    // as llama_tokenize(), which the callback may stop. what the vocabulary throws goes to the log. both give INT32_MIN
    LLAMA_API int32_t llama_pop_tokenize(const struct llama_vocab * vocab, const char * text, int32_t n_text, llama_token * tokens,
        int32_t n_tokens_max, bool add_special, bool parse_special, ggml_abort_callback callback, void * data);

    LLAMA_API void llama_pop_get_counters  (const struct llama_context * ctx, struct llama_pop_counters * counters);
    LLAMA_API void llama_pop_reset_counters(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif

//
// what the file says
//

struct llama_pop_hparams {
    uint32_t boundary    = 0; // first skipped layer, 0: none
    uint32_t sink_tokens = 1;
    uint32_t tail_tokens = 16; // a hint, here only for the size of the reserve
    bool     fitted      = false;
    bool     wide        = false; // fitted to more than the state of the row
    bool     attention   = false; // wide, and fitted to what the attention of the layer at the boundary gives
    bool     fitted_images = false; // on rows of images, too; else these use the layers' own projections
};

// fitted projections of a layer. wide ones have a second input, which the layer at the boundary makes: the previous row's
// state, reduced, some neurons of its FFN, see llama-pop-fit.cpp, and perhaps the heads of its attention
struct llama_pop_layer {
    ggml_tensor * wk   = nullptr; // [n_embd, n_embd_k_gqa]
    ggml_tensor * wk_b = nullptr; // [n_embd_k_gqa]
    ggml_tensor * wv   = nullptr; // [n_embd, n_embd_v_gqa]
    ggml_tensor * wv_b = nullptr; // [n_embd_v_gqa]

    ggml_tensor * wk_wide = nullptr; // [n_wide, n_embd_k_gqa]
    ggml_tensor * wv_wide = nullptr; // [n_wide, n_embd_v_gqa]

    // of the layer at the boundary
    ggml_tensor * prev = nullptr; // [n_embd, n_prev]
    ggml_tensor * gate = nullptr; // [n_embd, n_neurons], null where there are none
    ggml_tensor * up   = nullptr; // [n_embd, n_neurons]
};

// why a model cannot be pruned from this layer on, empty: it can
std::string llama_pop_find_obstacle(const llama_model & model, uint32_t boundary);

// see llama_pop_model_exact()
uint32_t llama_pop_exact_layer(const llama_hparams & hparams);

// a sidecar is the file after the model's own, of which there is one unless n_split says more. empty: there is none
std::string llama_pop_take_sidecar(std::vector<std::string> & paths, uint16_t n_split);

// adds its keys and tensors to those of the model
void llama_pop_load_sidecar(llama_model_loader & ml, const std::string & path);

void llama_pop_load_hparams(llama_model_base & model, llama_model_loader & ml);
void llama_pop_load_tensors(llama_model_base & model, llama_model_loader & ml);

//
// what the caller says, of a context
//

struct llama_pop_tap {
    llama_pop_tap_kind kind;
    int32_t            layer;

    bool operator==(const llama_pop_tap & other) const { return kind == other.kind && layer == other.layer; }
};

struct llama_pop_cparams {
    llama_pop_mode mode        = LLAMA_POP_MODE_OFF;
    uint32_t       boundary    = 0;
    uint32_t       sink_tokens = 0;
    uint32_t       exact       = 0; // the boundary of exact skipping, 0: none. only where the file has no other

    std::vector<llama_pos> full_from; // by sequence, no entry: none by position

    std::vector<std::vector<llama_pos>> deep_rows; // by sequence, ascending

    std::vector<llama_pop_tap> taps;

    llama_seq_id question_seq = -1; // -1: there is no question
    llama_pos    question_pos = -1;

    llama_memory_i * memory = nullptr; // of the context

    bool apart = false; // the memory takes no second build: context and full rows come in ubatches of their own

    const float * states = nullptr; // of a deep pass, [n_embd, n_rows]

    uint32_t n_reserve = 0; // the next graph is for a reserve: that of a pruned prefill with so many full rows. 0: for none
    bool deepening = false; // the next graph is a deep pass
    bool keep      = false; // the states at the boundary
    bool kernels   = true;  // our kernels for CPUs may compute

    llama_pop_reading reading = LLAMA_POP_READING_NONE;
};

// what a context keeps of its rows, by the cells of their stream. a cell that another row takes forgets that it was kept,
// see llama_kv_cells::pos_set()
struct llama_pop_kept {
    uint32_t boundary = 0;

    std::vector<float> states; // [n_embd, n_cells, n_streams]

    // attention by the question and by every LLAMA_POP_SCORE_STRIDE-th row
    std::vector<float> asked;  // [n_cells, n_head, n_score_layers]
    std::vector<float> paid;   // likewise
};

struct llama_pop_tapped_rows {
    llama_pop_tap tap;
    ggml_tensor * cur;
    llama_pos     pos; // of the first row
    int32_t       n_rows;

    std::vector<uint32_t> cells; // of the rows, for MASS
};

llama_pop_cparams llama_pop_init(const llama_model & model);

// the ubatches of separate KV streams hold one sequence each, since rows are picked within one stream. so do those of
// memories that take context and full rows apart
bool llama_pop_one_seq(const llama_cparams & cparams, uint32_t n_outputs, uint32_t n_tokens);

// whether two rows of a batch belong into different ubatches. pop: null, they never do
bool llama_pop_differ(const llama_pop_cparams * pop, const llama_batch & batch, int32_t a, int32_t b);

// reserve the compute buffers for a pruned prefill, false: out of memory
bool llama_pop_reserve(llama_context & ctx, llama_pop_cparams & pop, uint32_t n_tokens, const llama_memory_context_i * mctx);

static const int LLAMA_POP_SCORE_LAYERS = 4;
static const int LLAMA_POP_SCORE_STRIDE = 16;
static const int LLAMA_POP_TAP_STRIDE   = 16;

void llama_pop_count(llama_pop_counters & counters, const llama_cparams & cparams, const llama_ubatch & ubatch);

//
// graph
//

struct llama_pop_plan {
    int32_t il = -1; // first layer of the full rows alone, -1: all rows run all layers

    std::vector<int32_t> rows; // the full rows of the ubatch, as many of each KV stream
};

// whether somebody reads the states of all rows, so that all are full
bool llama_pop_reads_all(const llama_cparams & cparams);

// room for nodes. n_nodes: that of an unpruned graph
uint32_t llama_pop_max_nodes(llama_memory_i * memory, uint32_t n_nodes);

llama_pop_plan llama_pop_make_plan(const llama_cparams & cparams, const llama_ubatch & ubatch);

bool llama_pop_same_graph(const llm_graph_params & a, const llm_graph_params & b);

// tells our kernels for CPUs which operations of a new graph are theirs
void llama_pop_mark_graph(llm_graph_result & res, const llama_pop_cparams & pop);

//
// building
//
// the architecture's own code builds the graph, once or twice. context pass: for all rows; the layers from the boundary on are
// given the states there, and only what they write into the memory stays, with what that needs. deep pass: for the full rows;
// the layers below the boundary go, and those from there on begin with the states of the context pass, or with kept ones
//

enum llama_pop_pass {
    LLAMA_POP_PASS_WHOLE   = 0, // neither: all rows run all layers
    LLAMA_POP_PASS_CONTEXT = 1,
    LLAMA_POP_PASS_DEEP    = 2,
};

// how far a graph is built, of its llm_graph_result
struct llama_pop_build {
    llama_pop_pass pass = LLAMA_POP_PASS_WHOLE;

    const llama_model * model = nullptr;

    int32_t boundary    = 0;  // 0: nothing is to be done at any layer
    int32_t n_nodes     = -1; // those of the graph when the boundary was met in this pass, -1: not yet
    int32_t n_context   = -1; // nodes before those of the deep pass, -1: there is none beside another pass
    int32_t n_projected = 0;  // layers that took their fitted projections

    ggml_tensor * state = nullptr; // at the boundary, of all rows
    ggml_tensor * wide  = nullptr; // the wider input of fitted projections

    std::vector<std::pair<llama_pop_tap, ggml_tensor *>> taps;

    llm_graph_input_pop * deep = nullptr; // owned by the result
};

// to be called in the place of build_arch_graph()
std::unique_ptr<llm_graph_context> llama_pop_build_graph(const llama_model & model, const llm_graph_params & params);

// to be called at the end of each layer: what the next one is given, and at the boundary the states that a pass begins with
ggml_tensor * llama_pop_end_layer(const llm_graph_context & g, ggml_tensor * cur, int il);

// to be called where a layer has projected its K and V from cur: in skipped layers they become the fitted ones
void llama_pop_project(const llm_graph_context & g, const llama_layer & layer, ggml_tensor * cur, ggml_tensor *& k, ggml_tensor *& v);

// to be called with what a layer gives, with its K and V, and when all layers are built
void llama_pop_tap_state(const llm_graph_context & g, ggml_tensor * cur, int il);
void llama_pop_tap_kv   (const llm_graph_context & g, const llama_layer & layer, ggml_tensor * k, ggml_tensor * v);
void llama_pop_tap_heads(const llm_graph_context & g);

// to be called by the attention, as llama_pop_score()
void llama_pop_tap_mass(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale, int il);

void llama_pop_take_taps(llama_context & ctx, const llama_ubatch & ubatch, const llama_memory_context_i * mctx, const llm_graph_result & res);

// rows whose attention is counted
struct llama_pop_scored {
    std::vector<int32_t> rows;
    std::vector<float>   weights; // [n_rows, 2]: 1 where a row counts as asked, as paid
};

llama_pop_scored llama_pop_make_scored(const llama_cparams & cparams, const llama_ubatch & ubatch);

// to be called by the attention. q [n, n_head, n_tokens], k [n, n_head_kv, n_kv]
void llama_pop_score(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale, int il);

// the names of the graph's outputs: states [n_embd, n_tokens]; of a layer, asked and paid [2, n_kv, n_head]
#define LLAMA_POP_STATES "pop_states"
#define LLAMA_POP_SCORES "pop_scores-%d"
