// prefill-only pruning: fitted projections of skipped layers and their second input, see llama-pop.h

#include "llama-pop-build.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <stdexcept>

// neurons have unit variance in the fit's data. rare outliers would spoil the K/V of a whole text, so they are clamped, as in the fit
static const float MAX_NEURON = 5.0f;

// return the preceding row of each row's first sequence, or the row itself if the ubatch has none. positions never decrease
// within a sequence, so the preceding row in the ubatch is the preceding token (images: the preceding patch)
static std::vector<int32_t> find_previous(const llama_ubatch & ubatch) {
    std::vector<int32_t> last(LLAMA_MAX_SEQ, -1);
    std::vector<int32_t> res;

    for (int32_t i = 0; i < (int32_t) ubatch.n_tokens; ++i) {
        const int32_t found = last[ubatch.seq_id[i][0]];
        res.push_back(found < 0 ? i : found);

        for (int32_t s = 0; s < ubatch.n_seq_id[i]; ++s) {
            last[ubatch.seq_id[i][s]] = i;
        }
    }
    return res;
}

class llm_graph_input_pop_previous : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch * ubatch) override {
        ggml_backend_tensor_set(rows, find_previous(*ubatch).data(), 0, ggml_nbytes(rows));
    }

    bool can_reuse(const llm_graph_params & params) override {
        return params.ubatch.n_tokens == rows->ne[0];
    }

    ggml_tensor * rows = nullptr; // I32 [n_tokens]
};

// return whether the FFN of the layer at the boundary, whose nodes were just built, uses GELU
static bool has_gelu(ggml_cgraph * gf, int first) {
    for (int i = first; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_GLU) {
            return ggml_get_glu_op(node) == GGML_GLU_OP_GEGLU;
        }
    }
    return false;
}

static ggml_tensor * build_neurons(const llm_graph_context & g, const llama_layer & layer, ggml_tensor * normed) {
    ggml_tensor * cur  = ggml_mul(g.ctx0, normed, layer.ffn_norm);
    ggml_tensor * gate = g.build_lora_mm(layer.pop.gate, cur);
    ggml_tensor * up   = g.build_lora_mm(layer.pop.up,   cur);

    cur = has_gelu(g.gf, g.res->pop.n_nodes) ? ggml_geglu_split(g.ctx0, gate, up) : ggml_swiglu_split(g.ctx0, gate, up);
    cur = ggml_clamp(g.ctx0, cur, -MAX_NEURON, MAX_NEURON);
    g.cb(cur, "pop_neurons", -1);
    return cur;
}

// build the second input [n_wide, n_tokens] for all layers after the boundary
static ggml_tensor * build_wide(const llm_graph_context & g) {
    const auto & build = g.res->pop;
    const auto & layer = build.model->layers[build.boundary];

    ggml_tensor * normed = g.build_norm(build.state, nullptr, nullptr, LLM_NORM_RMS, -1);

    auto inp = std::make_unique<llm_graph_input_pop_previous>();
    inp->rows = llama_pop_new_input(g, GGML_TYPE_I32, g.n_tokens, 1);

    ggml_tensor * wide = llama_pop_get_rows(g, g.build_lora_mm(layer.pop.prev, normed), inp->rows);
    g.cb(wide, "pop_previous", -1);

    g.res->add_input(std::move(inp));

    if (layer.pop.gate) {
        wide = ggml_concat(g.ctx0, wide, build_neurons(g, layer, normed), 0);
    }
    return wide;
}

void llama_pop_project(const llm_graph_context & g, const llama_layer & layer, ggml_tensor * cur, ggml_tensor *& k, ggml_tensor *& v) {
    auto & build = g.res->pop;

    // projections fitted on text only are worse for images than the layer's own
    if (build.pass != LLAMA_POP_PASS_CONTEXT || !layer.pop.wk || (g.ubatch.embd && !g.hparams.pop.fitted_images)) {
        return;
    }

    ggml_tensor * fitted_k = g.build_lora_mm(layer.pop.wk, cur);
    ggml_tensor * fitted_v = g.build_lora_mm(layer.pop.wv, cur);

    if (g.hparams.pop.wide) {
        build.wide = build.wide ? build.wide : build_wide(g);

        fitted_k = ggml_add(g.ctx0, fitted_k, g.build_lora_mm(layer.pop.wk_wide, build.wide));
        fitted_v = ggml_add(g.ctx0, fitted_v, g.build_lora_mm(layer.pop.wv_wide, build.wide));
    }

    fitted_k = ggml_add(g.ctx0, fitted_k, layer.pop.wk_b);
    fitted_v = ggml_add(g.ctx0, fitted_v, layer.pop.wv_b);

    k = ggml_reshape_3d(g.ctx0, fitted_k, k->ne[0], k->ne[1], k->ne[2]);
    v = ggml_reshape_3d(g.ctx0, fitted_v, v->ne[0], v->ne[1], v->ne[2]);

    build.n_projected++;
}

void llama_pop_check_projected(const llm_graph_params & params) {
    const auto & pop = params.hparams.pop;

    const int32_t n_projected = params.res->pop.n_projected;
    const int32_t n_fitted    = !pop.fitted || (params.ubatch.embd && !pop.fitted_images) ? 0 : params.hparams.n_layer() - pop.boundary - 1;
    if (n_projected != n_fitted) {
        throw std::runtime_error(format("prefill-only pruning: the graph of architecture '%s' uses fitted projections in %d of %d layers",
                llm_arch_name(params.arch), n_projected, n_fitted));
    }
}
