// prefill-only pruning: inputs of a graph's second build, see llama-pop-inputs.h

#include "llama-pop-inputs.h"

#include "llama-pop-cells.h"

llm_graph_input_pop::llm_graph_input_pop(const llm_graph_params & whole) : params(whole) {
    update(whole);
}

void llm_graph_input_pop::set_input(const llama_ubatch *) {
    if (states) {
        ggml_backend_tensor_set(states, params.cparams.pop.states, 0, ggml_nbytes(states));
    }
    for (int64_t i = 0; ids && i < ids->ne[1]; ++i) {
        ggml_backend_tensor_set(ids, plan.rows.data(), i*ids->nb[1], plan.rows.size()*sizeof(int32_t));
    }
    for (auto & input : inputs) {
        input->set_input(&params.ubatch);
    }
}

bool llm_graph_input_pop::can_reuse(const llm_graph_params & whole) {
    const auto il     = plan.il;
    const auto n_rows = plan.rows.size();

    update(whole);

    bool res = il == plan.il && n_rows == plan.rows.size();
    for (auto & input : inputs) {
        res = res && input->can_reuse(params);
    }
    return res;
}

void llm_graph_input_pop::update(const llm_graph_params & whole) {
    plan = llama_pop_make_plan(whole.cparams, whole.ubatch);

    params.cparams = whole.cparams;
    params.ubatch  = whole.ubatch;
    params.mctx    = whole.mctx;

    // a deep pass without a context pass already has its own ubatch and cells
    if (plan.il < 0) {
        return;
    }
    params.ubatch = llama_pop_pick_rows(whole.ubatch, plan.rows, whole.hparams.n_embd_inp());

    // a reserve's rows have no cells
    if (whole.cparams.pop.n_reserve == 0) {
        auto * memory = whole.cparams.pop.memory;

        const auto places = llama_pop_pick_places(*whole.mctx, plan.rows);

        mctx        = llama_pop_use_places(memory, places, params.ubatch);
        params.mctx = mctx.get();

        const llama_pop_in_place guard(memory, places);
        mctx->apply();
    }
}
