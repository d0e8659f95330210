// prefill-only pruning: what full rows compute, handed out for fits of projections, see llama-pop.h

#include "llama-pop.h"

#include "llama-pop-cells.h"
#include "llama-pop-graph.h"

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

    const bool all_full = build.pass == LLAMA_POP_PASS_WHOLE || (build.pass == LLAMA_POP_PASS_DEEP && pop.deepening);
    const bool is_built = build.pass == LLAMA_POP_PASS_WHOLE || layer >= (int) pop.boundary;

    return all_full && is_built && g.n_tokens > 1 && std::find(pop.taps.begin(), pop.taps.end(), llama_pop_tap { kind, layer }) != pop.taps.end();
}

// a copy, which lives until the ubatch is done
static void add_tap(const llm_graph_context & g, llama_pop_tap_kind kind, int layer, ggml_tensor * cur, int64_t n_rows) {
    char name[GGML_MAX_NAME];
    snprintf(name, sizeof(name), "pop_tap_%d-%d", kind, layer);

    cur = ggml_cont_2d(g.ctx0, cur, ggml_nelements(cur)/n_rows, n_rows);
    build_output(g, cur, name);

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

void llama_pop_tap_heads(const llm_graph_context & g) {
    for (const auto & tap : g.cparams.pop.taps) {
        if (tap.kind != LLAMA_POP_TAP_HEADS || !is_tapped(g, tap.kind, tap.layer)) {
            continue;
        }
        const auto name = format("kqv_out-%d", tap.layer);
        if (ggml_tensor * heads = ggml_graph_get_tensor(g.gf, name.c_str())) {
            add_tap(g, tap.kind, tap.layer, heads, g.n_tokens);
        }
    }
}

// the attention of every LLAMA_POP_TAP_STRIDE-th row of the ubatch, of all heads together: [n_kv, n_rows]
void llama_pop_tap_mass(const llm_graph_context & g, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale, int il) {
    if (k->ne[3] != 1 || !is_tapped(g, LLAMA_POP_TAP_MASS, il)) {
        return;
    }
    const int64_t n_rows = (g.n_tokens - 1)/LLAMA_POP_TAP_STRIDE + 1;

    ggml_tensor * asking = ggml_cont(g.ctx0, ggml_view_3d(g.ctx0, q, q->ne[0], q->ne[1], n_rows, q->nb[1], q->nb[2]*LLAMA_POP_TAP_STRIDE, 0));
    ggml_tensor * mask   = ggml_cont(g.ctx0, ggml_view_2d(g.ctx0, kq_mask, kq_mask->ne[0], n_rows, kq_mask->nb[1]*LLAMA_POP_TAP_STRIDE, 0));

    ggml_tensor * kq = llama_pop_attend(g, asking, k, mask, kq_scale);

    // the heads first, whose sum it is
    kq = ggml_sum_rows(g.ctx0, ggml_cont(g.ctx0, ggml_permute(g.ctx0, kq, 1, 2, 0, 3)));
    add_tap(g, LLAMA_POP_TAP_MASS, il, kq, n_rows);
}

//
// after each ubatch
//

// what each row receives from the later ones of the ubatch
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

// the tensors stay as they are until the next graph
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
        LLAMA_LOG_ERROR("%s: there is no tap %d of layer %d\n", __func__, kind, layer);
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

    // of a memory without cells nothing is known
    const auto mass = rows.cells.empty() ? std::vector<float>(rows.n_rows, 1.0f) : sum_mass(by_row, (rows.n_rows - 1)/LLAMA_POP_TAP_STRIDE + 1, rows.cells);
    std::copy(mass.begin(), mass.end(), dst);
    return 0;
}
