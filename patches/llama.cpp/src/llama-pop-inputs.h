// prefill-only pruning: inputs of a graph's second build, see llama-pop.h

#pragma once

#include "llama-graph.h"
#include "llama-memory.h"

// inputs of the deep pass: the full rows' ubatch, their cells, and their states at the boundary
class llm_graph_input_pop : public llm_graph_input_i {
public:
    explicit llm_graph_input_pop(const llm_graph_params & whole);

    // note: ignores the argument and uses the ubatch of the constructor or the last can_reuse()
    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & whole) override;

    llm_graph_params params; // of the second build

    ggml_tensor * ids    = nullptr; // I32 [n_rows, n_slices], all slices equal
    ggml_tensor * states = nullptr; // F32 [n_embd, n_rows], snapshots

    std::vector<llm_graph_input_ptr> inputs;

private:
    void update(const llm_graph_params & whole);

    llama_pop_plan           plan;
    llama_memory_context_ptr mctx;
};
