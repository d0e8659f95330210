// prefill-only pruning: taps, which copy activations of full rows for fitting projections, see llama-pop.h

#include "llama-pop.h"

#include "llama-pop-cells.h"
#include "llama-pop-build.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

//
// the graph
//

static bool is_tapped(const llm_graph_context & g, llama_pop_tap_kind kind, int layer) {
    const auto & build = g.res->pop;
    const auto & pop   = g.cparams.pop;

    const bool all_full = build.pass == LLAMA_POP_PASS_WHOLE || (build.pass == LLAMA_POP_PASS_DEEP && pop.is_deep_pass);
    const bool is_built = build.pass == LLAMA_POP_PASS_WHOLE || layer >= (int) pop.boundary;

    return all_full && is_built && g.n_tokens > 1 && std::find(pop.taps.begin(), pop.taps.end(), llama_pop_tap { kind, layer }) != pop.taps.end();
}

// add a copy as an output of the graph, since the scheduler may reuse the tensor's memory
static void add_tap(const llm_graph_context & g, llama_pop_tap_kind kind, int layer, ggml_tensor * cur, int64_t n_rows) {
    char name[GGML_MAX_NAME];
    snprintf(name, sizeof(name), "pop_tap_%d-%d", kind, layer);

    cur = ggml_cont_2d(g.ctx0, cur, ggml_nelements(cur)/n_rows, n_rows);
    llama_pop_add_output(g, cur, name);

    g.res->pop.taps.push_back({ { kind, layer }, cur });
}

void llama_pop_tap_state(const llm_graph_context & g, ggml_tensor * cur, int il) {
    if (is_tapped(g, LLAMA_POP_TAP_STATE, il + 1) && cur->ne[0] == g.n_embd && cur->ne[1] == g.n_tokens && cur->ne[2] == 1) {
        add_tap(g, LLAMA_POP_TAP_STATE, il + 1, cur, g.n_tokens);
    }
}

void llama_pop_tap_kv(const llm_graph_context & g, const llama_layer & layer, ggml_tensor * k, ggml_tensor * v) {
    const int il = &layer - g.res->pop.model->layers.data();

    if (is_tapped(g, LLAMA_POP_TAP_K, il)) {
        add_tap(g, LLAMA_POP_TAP_K, il, k, g.n_tokens);
    }
    if (is_tapped(g, LLAMA_POP_TAP_V, il)) {
        add_tap(g, LLAMA_POP_TAP_V, il, v, g.n_tokens);
    }
}

// return the attention [n_kv, n_rows, n_head] of rows q [n, n_head, n_rows] to k [n, n_head_kv, n_kv]
static ggml_tensor * attend(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale) {
    ggml_tensor * kq = ggml_mul_mat(g.ctx0, ggml_permute(g.ctx0, k, 0, 2, 1, 3), ggml_permute(g.ctx0, q, 0, 2, 1, 3));
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    if (g.hparams.attn_soft_cap) {
        const float cap = g.hparams.f_attn_logit_softcapping;
        kq = ggml_scale(g.ctx0, ggml_tanh(g.ctx0, ggml_scale(g.ctx0, kq, 1.0f/cap)), cap);
    }
    return ggml_soft_max_ext(g.ctx0, kq, kq_mask, kq_scale, g.hparams.f_max_alibi_bias);
}

// tap the attention of every LLAMA_POP_TAP_STRIDE-th row of the ubatch, summed over heads: [n_kv, n_rows]
void llama_pop_tap_mass(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale, int il) {
    if (k->ne[3] != 1 || !is_tapped(g, LLAMA_POP_TAP_MASS, il)) {
        return;
    }
    const int64_t n_rows = (g.n_tokens - 1)/LLAMA_POP_TAP_STRIDE + 1;

    ggml_tensor * q_rows = ggml_cont(g.ctx0, ggml_view_3d(g.ctx0, q, q->ne[0], q->ne[1], n_rows, q->nb[1], q->nb[2]*LLAMA_POP_TAP_STRIDE, 0));
    ggml_tensor * mask   = ggml_cont(g.ctx0, ggml_view_2d(g.ctx0, kq_mask, kq_mask->ne[0], n_rows, kq_mask->nb[1]*LLAMA_POP_TAP_STRIDE, 0));

    ggml_tensor * kq = attend(g, q_rows, k, mask, kq_scale);

    // heads become the first dimension, which ggml_sum_rows() sums
    kq = ggml_sum_rows(g.ctx0, ggml_cont(g.ctx0, ggml_permute(g.ctx0, kq, 1, 2, 0, 3)));
    add_tap(g, LLAMA_POP_TAP_MASS, il, kq, n_rows);
}

//
// after each ubatch
//

// return the attention that each row receives from later rows of the ubatch
static std::vector<float> sum_mass(const std::vector<float> & by_row, int64_t n_rows, const std::vector<uint32_t> & cells) {
    const size_t n_kv = by_row.size()/n_rows;

    std::vector<float> res(cells.size(), 0.0f);
    for (int64_t r = 0; r < n_rows; ++r) {
        for (int64_t i = 0; i < r*LLAMA_POP_TAP_STRIDE; ++i) {
            res[i] += by_row[r*n_kv + cells[i]];
        }
    }
    return res;
}

// store the tapped tensors, which are valid until the next graph
void llama_pop_take_taps(llama_context & ctx, const llama_ubatch & ubatch, const llama_memory_context_i * mctx, const llm_graph_result & res) {
    ctx.pop_tapped.clear();

    for (const auto & [tap, cur] : res.pop.taps) {
        llama_pop_tapped_rows rows { tap, cur, ubatch.pos[0], (int32_t) ubatch.n_tokens, {} };
        if (tap.kind == LLAMA_POP_TAP_MASS) {
            if (const auto * kv = llama_pop_find_cache(mctx, ctx.get_model().hparams.is_swa(tap.layer))) {
                rows.cells = kv->pop_slots().idxs[0];
            }
        }
        ctx.pop_tapped.push_back(std::move(rows));
    }
}

//
// C ABI
//

int32_t llama_pop_add_tap(llama_context * ctx, int32_t kind, int32_t layer) {
    const int32_t n_layer = ctx->get_model().hparams.n_layer();

    if (kind < LLAMA_POP_TAP_STATE || kind > LLAMA_POP_TAP_MASS || layer < (kind == LLAMA_POP_TAP_STATE) || layer >= n_layer) {
        LLAMA_LOG_ERROR("%s: layer %d has no tap of kind %d\n", __func__, layer, kind);
        return -1;
    }
    ctx->pop().taps.push_back({ (llama_pop_tap_kind) kind, layer });
    return 0;
}

void llama_pop_remove_taps(llama_context * ctx) {
    ctx->pop().taps.clear();
    ctx->pop_tapped.clear();
}

int32_t llama_pop_n_tapped(const llama_context * ctx) {
    return ctx->pop_tapped.size();
}

int32_t llama_pop_get_tapped(const llama_context * ctx, int32_t i, llama_pop_tapped * tapped) {
    if (i < 0 || i >= llama_pop_n_tapped(ctx)) {
        return -1;
    }
    const auto & rows = ctx->pop_tapped[i];

    const bool is_mass = rows.tap.kind == LLAMA_POP_TAP_MASS;

    *tapped = { rows.tap.kind, rows.tap.layer, rows.pos, rows.n_rows, is_mass ? 1 : (int32_t) (ggml_nelements(rows.cur)/rows.n_rows) };
    return 0;
}

int32_t llama_pop_read_tapped(llama_context * ctx, int32_t i, float * dst) {
    if (i < 0 || i >= llama_pop_n_tapped(ctx)) {
        return -1;
    }
    ctx->synchronize();

    const auto & rows = ctx->pop_tapped[i];
    if (rows.tap.kind != LLAMA_POP_TAP_MASS) {
        ggml_backend_tensor_get(rows.cur, dst, 0, ggml_nbytes(rows.cur));
        return 0;
    }
    std::vector<float> by_row(ggml_nelements(rows.cur));
    ggml_backend_tensor_get(rows.cur, by_row.data(), 0, ggml_nbytes(rows.cur));

    // without a KV cache the rows' cells are unknown, and all rows weigh the same
    const auto mass = rows.cells.empty() ? std::vector<float>(rows.n_rows, 1.0f) : sum_mass(by_row, (rows.n_rows - 1)/LLAMA_POP_TAP_STRIDE + 1, rows.cells);
    std::copy(mass.begin(), mass.end(), dst);
    return 0;
}
