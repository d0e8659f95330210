// prefill-only pruning: helpers for building graphs, see llama-pop.h

#pragma once

#include "llama-pop.h"

#include "llama-graph.h"

inline ggml_tensor * llama_pop_new_input(const llm_graph_context & g, ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor * inp = ggml_new_tensor_2d(g.ctx0, type, ne0, ne1);
    ggml_set_input(inp);
    return inp;
}

// cur [n, n_tokens] or [n, n_tokens, n_slices], ids [n_rows, n_slices or more]
inline ggml_tensor * llama_pop_get_rows(const llm_graph_context & g, ggml_tensor * cur, ggml_tensor * ids) {
    return ggml_get_rows(g.ctx0, cur, ggml_view_2d(g.ctx0, ids, ids->ne[0], cur->ne[2], ids->nb[1], 0));
}

inline void llama_pop_add_output(const llm_graph_context & g, ggml_tensor * cur, const char * name) {
    ggml_set_name(cur, name);
    ggml_set_output(cur);
    ggml_build_forward_expand(g.gf, cur);
}

// throw if the architecture's graph does not use the fitted projections of all skipped layers
void llama_pop_check_projected(const llm_graph_params & params);
