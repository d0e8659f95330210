// Prefill-only pruning (POP, He et al., arXiv 2602.03295).
//
// A *full* row runs all layers. A *context* row runs only the layers below the boundary; its K/V of the skipped layers
// are projected from its state at the boundary. A row is full if its logits are requested, or its position is below
// sink_tokens, or it is at or past full_from of one of its sequences.
//
// Exact skipping: where the last layers read the K/V of an earlier one, a row whose logits are not requested is of no
// use past the last layer that stores K/V. It leaves there, and no other row changes. This needs no keys in the file.
//
// Deep pass: of rows whose state at the boundary was kept, the layers from there on run later, on the cells that the rows
// have. They attend to what the KV cache holds by then, and overwrite their projected K/V.

#pragma once

#include "llama.h"

#include "llama-arch.h"

#include <cstdint>
#include <initializer_list>
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
struct llama_memory_context_i;

struct llm_graph_context;
struct llm_graph_params;

class llm_graph_input_attn_kv;
class llm_graph_input_attn_kv_iswa;
class llm_graph_input_attn_no_cache;

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
    };

    enum llama_pop_deepen_result {
        LLAMA_POP_DEEPEN_REFUSED = -1, // nothing was done, the log says why
        LLAMA_POP_DEEPEN_FAILED  = -2, // the pass is to be done again, or the rows are to be removed
        LLAMA_POP_DEEPEN_DONE    =  0,
        LLAMA_POP_DEEPEN_ABORTED =  2, // by the abort callback: the pass is to be done again
    };

    LLAMA_API int32_t llama_pop_abi(void);

    // the boundary that the file asks for, 0: the file has no POP keys, -1: the architecture has no hook
    LLAMA_API int32_t llama_pop_model_boundary(const struct llama_model * model);

    // the first layer that rows without logits need not enter: those from it on store no K/V. 0: there is none
    LLAMA_API int32_t llama_pop_model_exact(const struct llama_model * model);

    LLAMA_API int32_t llama_pop_set_mode(struct llama_context * ctx, int32_t mode);
    LLAMA_API int32_t llama_pop_get_mode(const struct llama_context * ctx);

    // own projections only, 0: the file's boundary
    LLAMA_API int32_t llama_pop_set_boundary(struct llama_context * ctx, int32_t layer);
    LLAMA_API int32_t llama_pop_get_boundary(const struct llama_context * ctx);

    // the rows of this sequence at or past pos are full, -1: none by position
    LLAMA_API int32_t llama_pop_set_full_from(struct llama_context * ctx, llama_seq_id seq_id, llama_pos pos);

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

    // whether the CPU's kernels for prompts (ggml-cpu/pop) may compute: true at first
    LLAMA_API int32_t llama_pop_set_kernels(struct llama_context * ctx, bool kernels);

    // true: rows of a prompt are among those of each llama_decode() from now on. its products and attention are then left to
    // these kernels however few rows there are, so that no row depends on how the prompt was cut. deep passes always are
    LLAMA_API int32_t llama_pop_set_reading(struct llama_context * ctx, bool reading);

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
// state, reduced, some neurons of its FFN, see llama_pop_build_wide(), and perhaps the heads of its attention
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

bool llama_pop_supports(llm_arch arch);

// see llama_pop_model_exact()
uint32_t llama_pop_exact_layer(llm_arch arch, const llama_hparams & hparams);

// a sidecar is the file after the model's own, of which there is one unless n_split says more. empty: there is none
std::string llama_pop_take_sidecar(std::vector<std::string> & paths, uint16_t n_split);

// adds its keys and tensors to those of the model
void llama_pop_load_sidecar(llama_model_loader & ml, const std::string & path);

void llama_pop_load_hparams(llama_model_base & model, llama_model_loader & ml);
void llama_pop_load_tensors(llama_model_base & model, llama_model_loader & ml);

//
// what the caller says, of a context
//

struct llama_pop_cparams {
    llama_pop_mode mode        = LLAMA_POP_MODE_OFF;
    uint32_t       boundary    = 0;
    uint32_t       sink_tokens = 0;
    uint32_t       exact       = 0; // the first layer that rows without logits do not enter, 0: none

    std::vector<llama_pos> full_from; // by sequence, no entry: none by position

    llama_seq_id question_seq = -1; // -1: there is no question
    llama_pos    question_pos = -1;

    bool reserving = false; // the next graph is for the reserve of a pruned prefill
    bool deepening = false; // the next graph is a deep pass
    bool keep      = false; // the states at the boundary
    bool kernels   = true;  // the CPU's kernels for prompts may compute
    bool reading   = false; // rows of a prompt are among those of the next ubatches
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

llama_pop_cparams llama_pop_init(const llama_model & model);

// the ubatches of separate KV streams hold one sequence each, since rows are picked within one stream
bool llama_pop_one_seq(const llama_cparams & cparams, uint32_t n_outputs, uint32_t n_tokens);

// reserve the compute buffers for a pruned prefill, false: out of memory
bool llama_pop_reserve(llama_context & ctx, llama_pop_cparams & pop, uint32_t n_tokens, const llama_memory_context_i * mctx);

static const int LLAMA_POP_SCORE_LAYERS = 4;
static const int LLAMA_POP_SCORE_STRIDE = 16;

void llama_pop_count(llama_pop_counters & counters, const llama_hparams & hparams, const llama_cparams & cparams, const llama_ubatch & ubatch);

//
// graph
//

struct llama_pop_plan {
    int32_t il = -1; // first layer of the full rows alone, -1: all rows run all layers

    std::vector<int32_t> rows; // the full rows of the ubatch, as many of each KV stream
};

// whether somebody reads the states of all rows, so that all are full
bool llama_pop_reads_all(const llama_cparams & cparams);

// graph nodes beyond those of an unpruned graph, at the most
uint32_t llama_pop_n_nodes(const llama_model & model);

llama_pop_plan llama_pop_make_plan(const llama_hparams & hparams, const llama_cparams & cparams, const llama_ubatch & ubatch);

bool llama_pop_rope_per_layer(llm_arch arch);

bool llama_pop_has_gelu(llm_arch arch);

bool llama_pop_same_graph(const llm_graph_params & a, const llm_graph_params & b);

// tells the CPU's kernels for prompts which operations of a new graph are theirs
void llama_pop_mark_graph(ggml_cgraph * gf, const llama_pop_cparams & pop);

// to be called at the start of each layer. at the boundary it stores the projected K/V of all rows for the skipped
// layers, and reduces the state and the inputs to the full rows. true: no row goes on, leave the loop over the layers
// a deep pass begins at the boundary instead of at the first layer
bool llama_pop_enter_layer(llm_graph_context & g, const llama_model & model, int & il,
        ggml_tensor *& inpL, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_kv *& inp_attn);
bool llama_pop_enter_layer(llm_graph_context & g, const llama_model & model, int & il,
        ggml_tensor *& inpL, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_kv_iswa *& inp_attn);
bool llama_pop_enter_layer(llm_graph_context & g, const llama_model & model, int & il,
        ggml_tensor *& inpL, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_no_cache *& inp_attn);

// to be called in each layer that stores K/V, before its attention. in the last of them it stores K/V, here no longer
// needed, and reduces Q, the states and the inputs to the full rows. a state is [n, n_tokens] or [n, n_tokens, n_slices],
// or null. true: no row goes on, leave the loop over the layers
bool llama_pop_leave(llm_graph_context & g, int il, ggml_tensor *& q, ggml_tensor *& k, ggml_tensor *& v,
        std::initializer_list<ggml_tensor **> states,
        ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_kv_iswa *& inp_attn);

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
