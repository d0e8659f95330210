// Prefill-only pruning (POP, He et al., arXiv 2602.03295).
//
// A *full* row runs all layers. A *context* row runs only the layers below the boundary; its K/V of the skipped layers are
// projected from its state at the boundary. A row is full if its logits are requested, its position is below sink_tokens, it is
// at or past full_from of one of its sequences, or it is one of that sequence's deep rows.
//
// Exact skipping: if the last layers share the K/V of an earlier one, a row without logits needs nothing past the last layer
// that stores K/V. That layer becomes the boundary, with its own projections, and no other row changes. This needs no keys in
// the file.
//
// Deep pass: if the state of a row at the boundary is stored (a snapshot), the remaining layers can run later, in the row's
// cell. They attend to the current KV cache and overwrite the projected K/V.

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
    // C ABI
    //
    // setters return 0, or -1 and log an error. they take effect with the next llama_decode()
    //

    enum llama_pop_mode {
        LLAMA_POP_MODE_OFF     = 0, // every row runs all layers
        LLAMA_POP_MODE_CONTEXT = 1, // context rows are pruned, or leave exactly if the model allows it (default if either applies)
        LLAMA_POP_MODE_ALWAYS  = 2, // every row is pruned, and logits are computed from the state at the boundary
    };

    struct llama_pop_counters {
        int64_t n_context; // rows that stopped at the boundary
        int64_t n_full;    // rows that ran all layers
        int64_t n_exact;   // rows that left exactly, at the last layer that stores K/V
        int64_t n_deep;    // rows of deep passes
        int64_t n_marked;  // full rows that only llama_pop_set_deep_rows() made full
    };

    enum llama_pop_reading {
        LLAMA_POP_READING_NONE    = 0, // no prompt rows
        LLAMA_POP_READING_SOME    = 1, // prompt rows, some of them full
        LLAMA_POP_READING_CONTEXT = 2, // prompt rows, none of them full: full rows belong to answers
    };

    enum llama_pop_deep_result {
        LLAMA_POP_DEEP_REFUSED = -1, // nothing was changed, the log has the reason
        LLAMA_POP_DEEP_FAILED  = -2, // the pass must run again, or the caller must remove the rows
        LLAMA_POP_DEEP_DONE    =  0,
        LLAMA_POP_DEEP_ABORTED =  2, // by the abort callback: the pass must run again
    };

    // activations of a layer by row: f32 [n_rows, n_cols]
    enum llama_pop_tap_kind {
        LLAMA_POP_TAP_STATE = 0, // the layer's input
        LLAMA_POP_TAP_K     = 1, // before norm and RoPE
        LLAMA_POP_TAP_V     = 2,
        LLAMA_POP_TAP_MASS  = 3, // attention that the row receives from every LLAMA_POP_TAP_STRIDE-th later row, summed over heads
    };

    struct llama_pop_tapped {
        int32_t kind;
        int32_t layer;
        int32_t pos; // position of the first row
        int32_t n_rows;
        int32_t n_cols;
    };

    // return the version of this C ABI
    LLAMA_API int32_t llama_pop_abi(void);

    // report uncaught C++ exceptions, such as those of a damaged vocabulary, to ggml's abort callback before the process ends.
    // sets the process's terminate handler
    LLAMA_API void llama_pop_report_exceptions(void);

    // return the file's boundary, 0 if the file has no POP keys, -1 if the architecture cannot be pruned
    LLAMA_API int32_t llama_pop_model_boundary(const struct llama_model * model);

    // return the first of the layers without stored K/V, where rows without logits leave exactly. 0: none
    LLAMA_API int32_t llama_pop_model_exact(const struct llama_model * model);

    LLAMA_API int32_t llama_pop_set_mode(struct llama_context * ctx, int32_t mode);
    LLAMA_API int32_t llama_pop_get_mode(const struct llama_context * ctx);

    // set the boundary, with the layers' own projections. 0: the file's boundary
    LLAMA_API int32_t llama_pop_set_boundary(struct llama_context * ctx, int32_t layer);
    LLAMA_API int32_t llama_pop_get_boundary(const struct llama_context * ctx);

    // make the sequence's rows at or past pos full. -1: none by position
    LLAMA_API int32_t llama_pop_set_full_from(struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos);

    // make the sequence's rows at these n ascending positions full, instead of earlier ones. n = 0: none.
    // the caller chooses them, so that a row's depth may depend on its token
    LLAMA_API int32_t llama_pop_set_deep_rows(struct llama_context * ctx, llama_seq_id seq_id, const llama_pos * pos, int32_t n);

    // make every sequence's rows below position n full. -1: the file's value
    LLAMA_API int32_t llama_pop_set_sink(struct llama_context * ctx, int32_t n_tokens);

    // store every row's state at the boundary from the next llama_decode() on, as f32 in host memory, until its cell is reused.
    // false: stop, and drop all snapshots
    LLAMA_API int32_t llama_pop_set_snapshots(struct llama_context * ctx, bool snapshots);

    // return the memory of all snapshots in bytes
    LLAMA_API size_t llama_pop_snapshots_size(const struct llama_context * ctx);

    // run the layers from the boundary on for n rows of the sequence (1 to n_ubatch), at ascending positions. with logits of the
    // last row if requested. refused if a row has no snapshot, or if a layer with a sliding window has evicted rows that these
    // rows attend to. returns llama_pop_deep_result
    LLAMA_API int32_t llama_pop_run_deep(struct llama_context * ctx, llama_seq_id seq_id, const llama_pos * pos, int32_t n, bool logits);

    // move the rows of an edited prompt: n rows at positions from start on replace the sequence's rows there. row i takes K and V
    // of the row at position from[i], -1: llama_decode() must compute the row in place before another row attends to it.
    // returns 0, -1: refused, nothing was changed, the log has the reason, -2: K could not be rotated, the
    // caller must remove the rows at positions >= start
    LLAMA_API int32_t llama_pop_move_rows(struct llama_context * ctx, llama_seq_id seq_id, llama_pos start, const llama_pos * from,
        const llama_token * tokens, int32_t n);

    // let llama_decode() compute rows that already have cells, in place: a row overwrites its cell, and attends to rows up to its
    // position. such a batch has rows of one sequence. after a failure its rows are partly overwritten, and none is removed
    LLAMA_API int32_t llama_pop_set_overwrite(struct llama_context * ctx, bool overwrite);

    // allow our CPU kernels (ggml-cpu/fast). default: true
    LLAMA_API int32_t llama_pop_set_kernels(struct llama_context * ctx, bool kernels);

    // declare which rows of the following llama_decode() calls belong to a prompt (llama_pop_reading). our kernels compute the
    // products and attention of these for any number of rows, so that a row's result does not depend on how the prompt was
    // split. this always holds for deep passes
    LLAMA_API int32_t llama_pop_set_reading(struct llama_context * ctx, int32_t reading);

    // taps: copy the requested activations of each ubatch with several rows if all rows run all layers, and of each deep pass
    // from the boundary on. architectures whose K and V cannot be fitted have no taps
    LLAMA_API int32_t llama_pop_add_tap    (struct llama_context * ctx, int32_t kind, int32_t layer);
    LLAMA_API void    llama_pop_remove_taps(struct llama_context * ctx);

    // activations of the last ubatch of the last llama_decode() or deep pass, valid until the next one
    LLAMA_API int32_t llama_pop_n_tapped   (const struct llama_context * ctx);
    LLAMA_API int32_t llama_pop_get_tapped (const struct llama_context * ctx, int32_t i, struct llama_pop_tapped * tapped);
    LLAMA_API int32_t llama_pop_read_tapped(struct llama_context * ctx, int32_t i, float * dst);

    // return the multiply-accumulates of a prompt of n_tokens (up to n_ubatch) in an empty cache, up to the last row's logits, at
    // the current boundary and mode, with the last n_full rows full. scans of recurrent states are not counted. -1: error
    LLAMA_API int64_t llama_pop_count_macs(struct llama_context * ctx, int32_t n_tokens, int32_t n_full);

    // llama_tokenize() with a callback that can stop it. exceptions of the vocabulary are logged. returns INT32_MIN in both cases
    LLAMA_API int32_t llama_pop_tokenize(const struct llama_vocab * vocab, const char * text, int32_t n_text, llama_token * tokens,
        int32_t n_tokens_max, bool add_special, bool parse_special, ggml_abort_callback callback, void * data);

    LLAMA_API void llama_pop_get_counters  (const struct llama_context * ctx, struct llama_pop_counters * counters);
    LLAMA_API void llama_pop_reset_counters(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif

//
// keys and tensors of the file (llama-pop-load.cpp)
//

struct llama_pop_hparams {
    uint32_t boundary      = 0;     // first skipped layer, 0: none
    uint32_t sink_tokens   = 1;
    uint32_t tail_tokens   = 16;    // only sizes the reserve
    bool     fitted        = false;
    bool     wide          = false; // fitted with a second input, besides the row's state
    bool     fitted_images = false; // fitted on image rows too; otherwise these use the layers' own projections
};

// fitted projections of a layer. wide ones have a second input from the layer at the boundary: the previous row's reduced
// state and neurons of the FFN (llama-pop-fit.cpp)
struct llama_pop_layer {
    ggml_tensor * wk   = nullptr; // [n_embd, n_embd_k_gqa]
    ggml_tensor * wk_b = nullptr; // [n_embd_k_gqa]
    ggml_tensor * wv   = nullptr; // [n_embd, n_embd_v_gqa]
    ggml_tensor * wv_b = nullptr; // [n_embd_v_gqa]

    ggml_tensor * wk_wide = nullptr; // [n_wide, n_embd_k_gqa]
    ggml_tensor * wv_wide = nullptr; // [n_wide, n_embd_v_gqa]

    // only in the layer at the boundary
    ggml_tensor * prev = nullptr; // [n_embd, n_prev]
    ggml_tensor * gate = nullptr; // [n_embd, n_neurons], null if the fit has no neurons
    ggml_tensor * up   = nullptr; // [n_embd, n_neurons]
};

// return the reason why the model cannot be pruned from this layer on, empty if it can
std::string llama_pop_find_obstacle(const llama_model & model, uint32_t boundary);

// see llama_pop_model_exact()
uint32_t llama_pop_exact_layer(const llama_hparams & hparams);

// remove the sidecar from the paths and return it: the path after the model's n_split files. empty: none
std::string llama_pop_take_sidecar(std::vector<std::string> & paths, uint16_t n_split);

// add the sidecar's keys and tensors to the model's
void llama_pop_load_sidecar(llama_model_loader & ml, const std::string & path);

void llama_pop_load_hparams(llama_model_base & model, llama_model_loader & ml);
void llama_pop_load_tensors(llama_model_base & model, llama_model_loader & ml);

//
// settings of a context (llama-pop.cpp)
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
    uint32_t       exact       = 0; // boundary of exact skipping, 0: none. used only if the file has no boundary

    std::vector<llama_pos> full_from; // by sequence, no entry: none by position

    std::vector<std::vector<llama_pos>> deep_rows; // by sequence, ascending

    std::vector<llama_pop_tap> taps;

    llama_memory_i * memory = nullptr; // the context's

    bool separate_rows = false; // the memory supports no second build: context and full rows need separate ubatches

    const float * states = nullptr; // [n_embd, n_rows], input of a deep pass

    uint32_t n_reserve = 0; // the next graph reserves memory for a pruned prefill with N full rows. 0: an ordinary graph

    bool overwrite = false; // see llama_pop_set_overwrite()

    bool is_deep_pass = false; // the next graph is a deep pass
    bool snapshots    = false;

    bool kernels = true; // see llama_pop_set_kernels()

    llama_pop_reading reading = LLAMA_POP_READING_NONE;
};

// states at the boundary, by cell. llama_kv_cells::pos_set() invalidates a cell's snapshot when a row is placed there
struct llama_pop_snapshots {
    uint32_t boundary = 0;

    std::vector<float> states; // [n_embd, n_cells, n_streams]
};

struct llama_pop_tapped_rows {
    llama_pop_tap tap;
    ggml_tensor * cur;
    llama_pos     pos; // position of the first row
    int32_t       n_rows;

    std::vector<uint32_t> cells; // the rows' cells, for MASS
};

llama_pop_cparams llama_pop_init(const llama_model & model);

// return whether ubatches must hold one sequence each: full rows are selected within one KV stream, and some memories need
// context and full rows separated
bool llama_pop_one_seq(const llama_cparams & cparams, uint32_t n_outputs, uint32_t n_tokens);

// return whether rows a and b of a batch belong to different ubatches. pop: null if they never do
bool llama_pop_needs_split(const llama_pop_cparams * pop, const llama_batch & batch, int32_t a, int32_t b);

// reserve the compute buffers of a pruned prefill. returns false if out of memory
bool llama_pop_reserve(llama_context & ctx, llama_pop_cparams & pop, uint32_t n_tokens, const llama_memory_context_i * mctx);

void llama_pop_count(llama_pop_counters & counters, const llama_cparams & cparams, const llama_ubatch & ubatch);

//
// graph
//

struct llama_pop_plan {
    int32_t il = -1; // first layer that only full rows run, -1: all rows run all layers

    std::vector<int32_t> rows; // the full rows of the ubatch, equally many of each KV stream
};

// return whether the states of all rows are read, which makes all rows full
bool llama_pop_reads_all(const llama_cparams & cparams);

// return the maximum number of nodes, given that of an unpruned graph
uint32_t llama_pop_max_nodes(llama_memory_i * memory, uint32_t n_nodes);

llama_pop_plan llama_pop_make_plan(const llama_cparams & cparams, const llama_ubatch & ubatch);

bool llama_pop_same_graph(const llm_graph_params & a, const llm_graph_params & b);

// mark the operations of a new graph that our CPU kernels may or must compute
void llama_pop_mark_graph(llm_graph_result & res, const llama_pop_cparams & pop);

//
// building (llama-pop-graph.cpp)
//
// the architecture's own code builds the graph once or twice.
// context pass: for all rows. the layers from the boundary on get the state at the boundary, and only their writes to memory
// remain, with the inputs of these.
// deep pass: for the full rows. the layers below the boundary are dropped, and the others start from the states of the context
// pass or from snapshots
//

enum llama_pop_pass {
    LLAMA_POP_PASS_WHOLE   = 0, // all rows run all layers
    LLAMA_POP_PASS_CONTEXT = 1,
    LLAMA_POP_PASS_DEEP    = 2,
};

// progress of building a graph, stored in its llm_graph_result
struct llama_pop_build {
    llama_pop_pass pass = LLAMA_POP_PASS_WHOLE;

    const llama_model * model = nullptr;

    int32_t boundary    = 0;  // 0: nothing to do at any layer
    int32_t n_nodes     = -1; // number of nodes when this pass reached the boundary, -1: not yet
    int32_t n_context   = -1; // number of nodes of the context pass if a deep pass follows, else -1
    int32_t n_projected = 0;  // layers that used their fitted projections

    ggml_tensor * state = nullptr; // state at the boundary, of all rows
    ggml_tensor * wide  = nullptr; // second input of wide projections

    std::vector<std::pair<llama_pop_tap, ggml_tensor *>> taps;

    llm_graph_input_pop * deep = nullptr; // owned by the result
};

// called instead of build_arch_graph()
std::unique_ptr<llm_graph_context> llama_pop_build_graph(const llama_model & model, const llm_graph_params & params);

// called at the end of each layer. returns the input of the next one
ggml_tensor * llama_pop_end_layer(const llm_graph_context & g, ggml_tensor * cur, int il);

// called after a layer projected K and V from cur. replaces them by the fitted ones in skipped layers
void llama_pop_project(const llm_graph_context & g, const llama_layer & layer, ggml_tensor * cur, ggml_tensor *& k, ggml_tensor *& v);

// called with the output of layer il, and with a layer's K and V
void llama_pop_tap_state(const llm_graph_context & g, ggml_tensor * cur, int il);
void llama_pop_tap_kv   (const llm_graph_context & g, const llama_layer & layer, ggml_tensor * k, ggml_tensor * v);

// called by the attention. q [n, n_head, n_tokens], k [n, n_head_kv, n_kv]
void llama_pop_tap_mass(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale, int il);

void llama_pop_take_taps(llama_context & ctx, const llama_ubatch & ubatch, const llama_memory_context_i * mctx, const llm_graph_result & res);

static const int LLAMA_POP_TAP_STRIDE = 16;

// name of the graph's output with the states at the boundary, [n_embd, n_tokens]
#define LLAMA_POP_STATES "pop_states"
