// prefill-only pruning: the attention of a few rows, see llama-pop.h

#include "llama-pop.h"
#include "llama-pop-graph.h"

#include <cstdio>

class llm_graph_input_pop_scored : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch *) override {
        ggml_backend_tensor_set(rows,    scored.rows.data(),    0, ggml_nbytes(rows));
        ggml_backend_tensor_set(weights, scored.weights.data(), 0, ggml_nbytes(weights));
    }

    bool can_reuse(const llm_graph_params & params) override {
        scored = llama_pop_make_scored(params.cparams, params.ubatch);
        return (int64_t) scored.rows.size() == rows->ne[0];
    }

    llama_pop_scored scored;

    ggml_tensor * rows    = nullptr; // I32 [n_rows]
    ggml_tensor * weights = nullptr; // F32 [n_rows, 2]
};

// one input for all layers of a graph
static const llm_graph_input_pop_scored & get_scored_input(const llm_graph_context & g, llama_pop_scored scored) {
    for (const auto & inp : g.res->inputs) {
        if (const auto * found = dynamic_cast<const llm_graph_input_pop_scored *>(inp.get())) {
            return *found;
        }
    }

    auto inp = std::make_unique<llm_graph_input_pop_scored>();

    const int64_t n_rows = scored.rows.size();

    inp->scored  = std::move(scored);
    inp->rows    = new_input(g, GGML_TYPE_I32, n_rows, 1);
    inp->weights = new_input(g, GGML_TYPE_F32, n_rows, 2);

    return *static_cast<llm_graph_input_pop_scored *>(g.res->add_input(std::move(inp)));
}

ggml_tensor * llama_pop_attend(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale) {
    ggml_tensor * kq = ggml_mul_mat(g.ctx0, ggml_permute(g.ctx0, k, 0, 2, 1, 3), ggml_permute(g.ctx0, q, 0, 2, 1, 3));
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    if (g.hparams.attn_soft_cap) {
        const float cap = g.hparams.f_attn_logit_softcapping;
        kq = ggml_scale(g.ctx0, ggml_tanh(g.ctx0, ggml_scale(g.ctx0, kq, 1.0f/cap)), cap);
    }
    return ggml_soft_max_ext(g.ctx0, kq, kq_mask, kq_scale, g.hparams.f_max_alibi_bias);
}

void llama_pop_score(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale, int il) {
    const int boundary = g.cparams.pop.boundary;

    if (g.res->pop.pass == LLAMA_POP_PASS_DEEP || il >= boundary || il < boundary - LLAMA_POP_SCORE_LAYERS || k->ne[3] != 1) {
        return;
    }

    auto scored = llama_pop_make_scored(g.cparams, g.ubatch);
    if (scored.rows.empty()) {
        return;
    }

    const auto & inp = get_scored_input(g, std::move(scored));

    const int64_t n_head_dim = q->ne[0];
    const int64_t n_head     = q->ne[1];

    // a view into fused Q, K and V where nothing has rotated it
    if (!ggml_is_contiguous(q)) {
        q = ggml_cont(g.ctx0, q);
    }

    ggml_tensor * asking = pick_rows(g, ggml_reshape_2d(g.ctx0, q, n_head_dim*n_head, q->ne[2]), inp.rows);
    asking = ggml_reshape_3d(g.ctx0, asking, n_head_dim, n_head, inp.rows->ne[0]);

    ggml_tensor * kq      = llama_pop_attend(g, asking, k, pick_rows(g, kq_mask, inp.rows), kq_scale);
    ggml_tensor * by_cell = ggml_cont(g.ctx0, ggml_permute(g.ctx0, kq, 1, 0, 2, 3)); // [n_rows, n_kv, n_head]

    char name[GGML_MAX_NAME];
    snprintf(name, sizeof(name), LLAMA_POP_SCORES, il);
    build_output(g, ggml_mul_mat(g.ctx0, inp.weights, by_cell), name);
}
