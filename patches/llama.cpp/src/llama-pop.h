// Prefill-only pruning (POP, He et al., arXiv 2602.03295).
//
// A *full* row runs all layers. A *context* row runs only the layers below the boundary; its K/V of the skipped layers
// are projected from its state at the boundary. A row is full if its logits are requested, or its position is below
// sink_tokens, or it is at or past full_from of one of its sequences.
//
// Exact skipping: where the last layers read the K/V of an earlier one, a row whose logits are not requested is of no
// use past the last layer that stores K/V. It leaves there, and no other row changes. This needs no keys in the file.

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
};

// fitted projections of a layer
struct llama_pop_layer {
    ggml_tensor * wk   = nullptr; // [n_embd, n_embd_k_gqa]
    ggml_tensor * wk_b = nullptr; // [n_embd_k_gqa]
    ggml_tensor * wv   = nullptr; // [n_embd, n_embd_v_gqa]
    ggml_tensor * wv_b = nullptr; // [n_embd_v_gqa]
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

    bool reserving = false; // the next graph is for the reserve of a pruned prefill
};

llama_pop_cparams llama_pop_init(const llama_model & model);

// the ubatches of separate KV streams hold one sequence each, since rows are picked within one stream
bool llama_pop_one_seq(const llama_cparams & cparams, uint32_t n_outputs, uint32_t n_tokens);

// reserve the compute buffers for a pruned prefill, false: out of memory
bool llama_pop_reserve(llama_context & ctx, llama_pop_cparams & pop, uint32_t n_tokens, const llama_memory_context_i * mctx);

void llama_pop_count(llama_pop_counters & counters, const llama_hparams & hparams, const llama_cparams & cparams, const llama_ubatch & ubatch);

//
// graph
//

struct llama_pop_plan {
    int32_t il = -1; // first layer of the full rows alone, -1: all rows run all layers

    std::vector<int32_t> rows; // the full rows of the ubatch, as many of each KV stream
};

// graph nodes beyond those of an unpruned graph, at the most
uint32_t llama_pop_n_nodes(const llama_model & model);

llama_pop_plan llama_pop_make_plan(const llama_hparams & hparams, const llama_cparams & cparams, const llama_ubatch & ubatch);

bool llama_pop_rope_per_layer(llm_arch arch);

bool llama_pop_same_graph(const llm_graph_params & a, const llm_graph_params & b);

// to be called at the start of each layer. at the boundary it stores the projected K/V of all rows for the skipped
// layers, and reduces the state and the inputs to the full rows. true: no row goes on, leave the loop over the layers
bool llama_pop_enter_layer(llm_graph_context & g, const llama_model & model, int il,
        ggml_tensor *& inpL, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_kv *& inp_attn);
bool llama_pop_enter_layer(llm_graph_context & g, const llama_model & model, int il,
        ggml_tensor *& inpL, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_kv_iswa *& inp_attn);
bool llama_pop_enter_layer(llm_graph_context & g, const llama_model & model, int il,
        ggml_tensor *& inpL, ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_no_cache *& inp_attn);

// to be called in each layer that stores K/V, before its attention. in the last of them it stores K/V, here no longer
// needed, and reduces Q, the states and the inputs to the full rows. a state is [n, n_tokens] or [n, n_tokens, n_slices],
// or null. true: no row goes on, leave the loop over the layers
bool llama_pop_leave(llm_graph_context & g, int il, ggml_tensor *& q, ggml_tensor *& k, ggml_tensor *& v,
        std::initializer_list<ggml_tensor **> states,
        ggml_tensor *& inp_pos, ggml_tensor * inp_out_ids, llm_graph_input_attn_kv_iswa *& inp_attn);
